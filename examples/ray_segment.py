"""Segment many pictures as a batch job of Ray Data, on one machine or on a cluster.

    pip install 'talk2dino[ray]'
    python examples/ray_segment.py --checkpoint outputs/run --images photos --output segmented \
        --classes cat "sofa; couch" --actors 2

Every actor loads the model once and takes batches of paths; all machines must see the pictures, the
checkpoint and the output. Each picture becomes a label map PNG and a line of `segmented.jsonl` with
sizes and shares of the classes, or with what is wrong with it; then the status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ray

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import read_checkpoint
from talk2dino.datasets.benchmarks.classes import typed_classes
from talk2dino.datasets.pictures import is_picture
from talk2dino.errors import ConfigError, DataError, UserError
from talk2dino.files import refuse_foreign, replacing
from talk2dino.segmentation.overlay import is_our_picture

RESULT = "segmented.jsonl"


class Worker:
    """An actor: the model with its classes settled, called with batches of paths."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = Talk2DINO.from_pretrained(options.checkpoint)
        classes = typed_classes(options.classes)
        self.vocabulary = model.open_vocabulary(
            classes, pamr=options.pamr, short_side=options.short_side
        )
        self.images, self.output = options.images, options.output

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Write the label maps of some pictures; gives a line of JSON for each."""
        return {"line": [json.dumps(self.segment(str(name))) for name in batch["image"]]}

    def segment(self, name: str) -> dict[str, Any]:
        """One picture, named relative to the folder."""
        try:
            seg = self.vocabulary(self.images / name)
        except DataError as error:
            return {"image": name, "error": str(error)}
        labels = label_map_of(self.output, name)
        labels.parent.mkdir(parents=True, exist_ok=True)
        seg.save_labels(labels)
        label_map = labels.relative_to(self.output).as_posix()
        size = list(seg.labels.shape)
        return {"image": name, "size": size, "shares": seg.areas(), "label_map": label_map}


def label_map_of(output: Path, name: str) -> Path:
    """Where the label map of a picture goes."""
    return output / "labels" / f"{name}.png"


def pictures_of(options: argparse.Namespace) -> list[str]:
    """Names of the pictures, after a look at all options, so that no actor starts in vain.

    Raises:
        UserError: no such checkpoint, classes that are none, no pictures, or files in the way.
    """
    typed_classes(options.classes, "--classes")
    checkpoint = read_checkpoint(options.checkpoint)
    if checkpoint.vision is None or checkpoint.text is None:
        raise ConfigError(
            f"--checkpoint {options.checkpoint}: does not name its encoders; write a folder that "
            "does: python -m talk2dino.convert weights input=… output=… vision=… text=…"
        )
    if (options.output / RESULT).exists():
        raise ConfigError(f"{options.output / RESULT}: is there already; use another --output")
    made = options.output / "labels"  # of a run that was killed, if it lies within the folder
    names = [
        path.relative_to(options.images).as_posix()
        for path in sorted(options.images.rglob("*"))
        if is_picture(path) and not (path.is_relative_to(made) and is_our_picture(path))
    ]
    if not names:
        raise DataError(f"--images {options.images}: no pictures in this folder")
    maps = (label_map_of(options.output, name) for name in names)
    refuse_foreign(maps, is_our_picture, "this script", overwrite=None)
    return names


def main() -> None:
    """Read the options, run the job, and gather its lines as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, file or Hub id")
    parser.add_argument("--images", type=Path, required=True, help="folder, with its subfolders")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--classes", nargs="+", required=True, help='names, "sofa; couch"')
    parser.add_argument("--actors", type=int, default=2, help="processes with a model each")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--batch", type=int, default=16, help="pictures an actor takes at a time")
    parser.add_argument("--short-side", type=int, default=448, help="pixels")
    parser.add_argument("--pamr", action="store_true", help="refine the edges")
    options = parser.parse_args()
    options.images, options.output = options.images.resolve(), options.output.resolve()
    try:
        names = pictures_of(options)
    except UserError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    blocks = max(options.actors, -(-len(names) // options.batch))
    lines = ray.data.from_items([{"image": name} for name in names], override_num_blocks=blocks)
    lines = lines.map_batches(
        Worker,
        fn_constructor_args=(options,),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=options.gpus,
    )
    written, broken = 0, 0
    with replacing(options.output / RESULT) as temporary, temporary.open("w") as file:
        for row in lines.iter_rows():
            file.write(f"{row['line']}\n")
            written += 1
            broken += "error" in json.loads(row["line"])
    print(f"{options.output / RESULT}: {written} of {len(names)} pictures, {broken} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
