"""What a benchmark is: images with label maps, and the protocol to score them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import ClassList
from talk2dino.datasets.benchmarks.protocol import Protocol
from talk2dino.datasets.captions import check_limit
from talk2dino.errors import ConfigError

VOCABULARIES = ("full", "present")


@dataclass(frozen=True)
class Sample:
    """One image of a benchmark.

    Attributes:
        name: unique in the benchmark, usable as a file's path.
        image: [3, H, W] uint8 RGB.
        target: [H, W] int64, class index or the ignored value.
    """

    name: str
    image: Tensor
    target: Tensor


@dataclass(kw_only=True)
class Benchmark(Protocol):
    """The protocol that all benchmarks share, and what they count; subclasses give the images.

    Attributes:
        name: in reports.
        ignore_index: label value that does not count.
        background_threshold: see `Protocol`; of no effect if the class list has no background.
        templates: prompt templates; None takes those that suit the text encoder.
        vocabulary: `full`, or `present` to offer each image only the classes it contains.
        reference: published mIoU to print beside one's own: `{"name": 40.0}`, or
            `{"name": {"plain": 39.8, "pamr": 42.4}}`.
        limit: only the first images.
    """

    name: str
    ignore_index: int = 255
    background_threshold: float | Mapping[str, float] | None = 0.55
    templates: str | None = None
    vocabulary: str = "full"
    reference: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None

    _key: ClassVar[str] = "benchmark."

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ConfigError(
                f"benchmark.vocabulary={self.vocabulary!r}; choose one of {', '.join(VOCABULARIES)}"
            )
        check_limit(self.limit, "benchmark.limit")
        super().__post_init__()

    @property
    def class_list(self) -> ClassList:
        """The classes in index order."""
        raise NotImplementedError

    def threshold(self, vision_width: int | None) -> float | None:
        """As `Protocol.threshold`; None if the class list has no background."""
        value = super().threshold(vision_width)
        return value if self.class_list.has_background else None

    def __len__(self) -> int:
        raise NotImplementedError

    def check(self, advance: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Look for bad files before the work starts; `advance` gets (files checked, all).

        Raises:
            DataError: as `sample` does, as far as it can be told without reading every pixel.
        """

    def image_name(self, index: int) -> str:
        """The name that `sample(index)` will have, told without reading the image."""
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Read image and label map `index`.

        Raises:
            DataError: unreadable, sizes differ, or a label value that is no class.
        """
        raise NotImplementedError


def present_classes(target: Tensor, ignore_index: int) -> Sequence[int]:
    """Class indices that occur in a label map, ascending."""
    return [int(value) for value in torch.unique(target) if int(value) != ignore_index]
