"""Cityscapes, with prepared train ids or straight from the download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from talk2dino.segmentation.raw_labels import RawLabelsBenchmark

# The 19 evaluated ids of the 34, in the order of the classes (cityscapesScripts, `labels.py`).
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(kw_only=True)
class CityscapesBenchmark(RawLabelsBenchmark):
    """Train ids as cityscapesScripts' `createTrainIdLabelImgs.py` makes them, or `_labelIds.png`.

    The other 15 ids do not count, and neither does 255.
    """

    raw_suffix = "_gtFine_labelIds.png"
    raw_pattern = "*_gtFine_labelIds.png"

    def raw_label_map(self) -> Mapping[int, int | None]:
        """From id to train id 0..18."""
        return dict.fromkeys(range(34), self.ignore_index) | {
            number: train_id for train_id, number in enumerate(EVALUATED)
        }
