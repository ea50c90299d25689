"""What a benchmark is: images with label maps, and the protocol to segment and score them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import ClassList
from talk2dino.datasets.captions import check_limit
from talk2dino.errors import Advance, ConfigError

MODEL_SIZES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}  # by width of the vision encoder


@dataclass(kw_only=True)
class Protocol:
    """The settings of the sliding window, the same for a benchmark and for a picture of your own.

    A benchmark is a protocol with images (`benchmarks.base.Benchmark`); `Segmenter` takes either.

    Attributes:
        short_side: pixels of the short side before windows are cut.
        long_side: upper limit of the long side in pixels.
        window: side of a window in pixels.
        stride: distance of windows in pixels.
        input_size: the encoder sees every window at this size, a square, in pixels.
        background_cleaning: mix in the attention of the heads that fit a class.
        lambda_bg: weight of that attention, 0..1.
        background_threshold: score of the background channel; a number, numbers by model size
            (`ViT-S`, `ViT-B`, `ViT-L`) and `default` for all others, or None for no background.

    Raises:
        ConfigError: a size that is not positive, a stride that leaves gaps, or a threshold by
            model size that does not fit every model.

    >>> from talk2dino.datasets.benchmarks.base import Protocol
    >>> Protocol(window=224, stride=112).threshold(768) is None
    True
    >>> Protocol(background_threshold={"default": 0.55, "ViT-L": 0.54}).threshold(1024)
    0.54
    """

    short_side: int = 448
    long_side: int = 2048
    window: int = 448
    stride: int = 224
    input_size: int = 448
    background_cleaning: bool = False
    lambda_bg: float = 0.2
    background_threshold: float | Mapping[str, float] | None = None

    _key = ""  # what stands before a setting's name in an error

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side", "window", "stride", "input_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self._key}{name}={getattr(self, name)}: use 1 or more pixels")
        if self.stride > self.window:
            raise ConfigError(
                f"{self._key}stride={self.stride} leaves gaps between windows of {self.window} "
                f"pixels; use at most {self._key}window={self.window}"
            )
        given = self.background_threshold
        for width in (None, *MODEL_SIZES) if isinstance(given, Mapping) else (None,):
            self.threshold(width)  # refuses what does not fit every model
        if not 0 <= self.lambda_bg <= 1:
            raise ConfigError(f"{self._key}lambda_bg={self.lambda_bg}: use a weight within 0..1")

    def threshold(self, vision_width: int | None) -> float | None:
        """The background's score for a model, or None if there is no background.

        Args:
            vision_width: D of the vision encoder; None for an unknown model.

        Raises:
            ConfigError: the mapping has an unknown key or no `default`.
        """
        given = self.background_threshold
        if isinstance(given, Mapping):
            known = {*MODEL_SIZES.values(), "default"}
            if "default" not in given or not known.issuperset(given):
                raise ConfigError(
                    f"{self._key}background_threshold={dict(given)}: give a number, or numbers "
                    f"by {', '.join(sorted(known))}; default is needed"
                )
            given = given.get(MODEL_SIZES.get(vision_width or 0, ""), given["default"])
        if given is not None and not 0 <= given <= 1:
            raise ConfigError(
                f"{self._key}background_threshold={given}: scores lie within 0..1; try 0.55"
            )
        return None if given is None else float(given)


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

    _key = "benchmark."

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

    def check(self, advance: Advance = lambda done, total: None) -> None:
        """Look for bad files before the work starts; `advance` gets (files checked, all).

        Raises:
            DataError: as `sample` does, as far as that shows without reading every pixel.
        """

    def image_name(self, index: int) -> str:
        """The name that `sample(index)` will have, without reading the image."""
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
