"""COCO-Stuff 164k and COCO-Object, with prepared label files or straight from the download."""

from __future__ import annotations

from dataclasses import dataclass

from talk2dino.segmentation.coco_object import BACKGROUND_VALUES, STUFF_VALUES, THING_VALUES
from talk2dino.segmentation.raw_labels import RawLabelsBenchmark


@dataclass(kw_only=True)
class CocoStuffBenchmark(RawLabelsBenchmark):
    """`X_labelTrainIds.png` as mmsegmentation's `coco_stuff164k.py` makes them, or `X.png`.

    The 171 values that are in use are numbered in their order, 255 does not count.
    """

    raw_suffix = ".png"
    raw_pattern = "*[0-9].png"  # not X_labelTrainIds.png

    def raw_label_map(self) -> dict[int, int | None]:
        """From the value in `stuffthingmaps` to 0..170."""
        used = [*THING_VALUES, *STUFF_VALUES]
        return _only(dict(zip(used, range(len(used)), strict=True)) | {255: self.ignore_index})


@dataclass(kw_only=True)
class CocoObjectBenchmark(RawLabelsBenchmark):
    """`X_instanceTrainIds.png` as `convert_coco_object` makes them, or `X.png`.

    Things are 1..80, everything else is background, unlabelled pixels too.
    """

    raw_suffix = ".png"
    raw_pattern = "*[0-9].png"

    def raw_label_map(self) -> dict[int, int | None]:
        """From the value in `stuffthingmaps` to 0..80."""
        things = {value: number for number, value in enumerate(THING_VALUES, 1)}
        return _only(things | dict.fromkeys(BACKGROUND_VALUES, 0))


def _only(known: dict[int, int]) -> dict[int, int | None]:
    """Refuse the values that COCO-Stuff does not use."""
    return dict.fromkeys(range(256), None) | known
