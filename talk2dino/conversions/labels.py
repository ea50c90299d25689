"""`convert coco_object`: label maps of one benchmark from those of another."""

from __future__ import annotations

from pathlib import Path

from talk2dino.conversions.progress import progress
from talk2dino.segmentation.coco_object import convert_coco_object


def coco_object(input: str, output: str, num_workers: int = 2) -> None:
    """Convert COCO-Stuff label maps into those of COCO-Object; see `convert_coco_object`.

    Args:
        input: folder with `train2017` and `val2017` of stuffthingmaps_trainval2017, or one of them.
        output: folder to write into; may be the same.
        num_workers: processes.
    """
    target = Path(output).expanduser()
    with progress("coco_object") as advance:
        written = convert_coco_object(Path(input).expanduser(), target, num_workers, advance)
    print(f"{target}: {written} label maps written")
