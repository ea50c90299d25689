"""Datasets whose label files are usually prepared first, read without that step as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from talk2dino.segmentation.folder import FolderBenchmark


@dataclass(kw_only=True)
class RawLabelsBenchmark(FolderBenchmark):
    """Reads `mask_suffix`, or the download's own label files where no prepared one exists.

    Preparing only looks every pixel up in a table; here the same table is applied while reading,
    so the figures are the same.

    Attributes:
        raw_suffix: end of a raw label file's name.
        raw_pattern: glob that raw label files match and prepared ones do not.
    """

    raw_suffix: ClassVar[str]
    raw_pattern: ClassVar[str]

    def raw_label_map(self) -> Mapping[int, int | None]:
        """From raw value to label value; `ignore_index` for what does not count, None refuses."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        masks = self._path(self.masks)
        prepared = next(masks.rglob(f"*{self.mask_suffix}"), None)
        if prepared is None and next(masks.rglob(self.raw_pattern), None) is not None:
            self.mask_suffix, self.label_map = self.raw_suffix, self.raw_label_map()
        super().__post_init__()
