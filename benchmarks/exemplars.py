"""Words, exemplars and both, on 100 COCO photographs with masks of other photographs.

The photographs are split in ten folds; the classes of a fold are shown by one or five photographs
of the other nine, drawn by seed. A class that none of these shows falls back to its word, and is
counted. Scores at a quarter of the size, no PAMR; vocabularies as in real_data.py. Photographs are
encoded once and kept.

    python benchmarks/exemplars.py --checkpoint outputs/real_data/words-all-seed0
    python benchmarks/exemplars.py --checkpoint RUN --weights 0.25 0.5 0.75 --no-calibration
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from real_data import VOCABULARIES, coco100, shown, voc_names, write_classes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from talk2dino import Talk2DINO
from talk2dino.calibration.shown_classes import Seen, Spread, class_rows, see
from talk2dino.datasets.benchmarks.base import present_classes
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.evaluation.metrics import mean_iou, mean_iou_metric
from talk2dino.segmentation.scores import with_offsets
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures

FOLDS = 10  # photograph i is in fold i % FOLDS
LEAST = 196  # pixels at working size that an exemplar shows at least: a patch
Rows = Callable[[int], Tensor]  # photograph -> [K, D (+ 1)]
Shown = tuple[dict[int, Tensor], Tensor | None]  # rows by class, and the mean patch of them all


@dataclass
class Photograph:
    """An encoded photograph, its labels at a quarter of its size, and what it shows by class."""

    encoded: EncodedImage
    target: Tensor
    shown: dict[int, Seen]


def read(benchmark: FolderBenchmark, model: Talk2DINO, kept: Path) -> list[Photograph]:
    """All photographs; tokens are kept in the file `kept`, float16."""
    segmenter = model.segmenter(None, False, refinement=None)
    tokens = torch.load(kept, weights_only=True) if kept.exists() else []
    photographs = []
    for index in track(range(len(benchmark)), "photographs"):
        sample = benchmark.sample(index)
        working, windows = segmenter._cut(sample.image)
        if index == len(tokens):
            features = segmenter.encode(sample.image).features
            tokens.append(features.patch_tokens.half())
        side = int(tokens[index].shape[1] ** 0.5)
        none = torch.zeros(len(windows), 1, side * side)
        features = WindowFeatures(tokens[index].float(), none, (side, side))
        height, width = sample.target.shape
        encoded = EncodedImage(working, windows, features, (height, width))
        found: dict[int, Seen] = {}
        for number in present_classes(sample.target, benchmark.ignore_index):
            inside = sample.target == number
            if inside.float().mean() * working.shape[1] * working.shape[2] >= LEAST:
                seen = see(encoded, inside, segmenter.project_patches)
                first = next(iter(found.values()), seen)  # patches are those of the photograph
                found[number] = replace(seen, patches=first.patches)
        target = F.interpolate(sample.target[None, None].float(), (height // 4, width // 4))
        photographs.append(Photograph(encoded, target[0, 0].long(), found))
    torch.save(tokens, kept)
    return photographs


def shown_rows(
    photographs: list[Photograph], classes: int, count: int, seed: int, reference: Spread | None
) -> list[Shown]:
    """Per fold, the rows of the classes that up to `count` photographs of other folds show."""
    draw = torch.Generator().manual_seed(seed)
    folds = []
    for fold in track(range(FOLDS), f"rows of {count}, seed {seed}"):
        drawn = {}
        for k in range(classes):
            others = [p for i, p in enumerate(photographs) if i % FOLDS != fold and k in p.shown]
            order = torch.randperm(len(others), generator=draw)[:count].tolist()
            if order:
                drawn[k] = [others[i].shown[k] for i in order]
        rows, mean = class_rows(list(drawn.values()), reference)
        folds.append((dict(zip(drawn, rows, strict=True)), mean))
    return folds


def scores(
    photographs: list[Photograph], model: Talk2DINO, rows: Rows, voc: Tensor, ignore: int
) -> dict[str, float]:
    """Mean IoU with every vocabulary."""
    segmenter, count = model.segmenter(None, False, refinement=None), len(voc)
    metrics = {v: mean_iou_metric(count) for v in VOCABULARIES}
    for index, one in enumerate(track(photographs, "score")):
        every = rows(index)
        present = torch.zeros(count).bool()
        present[list(present_classes(one.target, ignore))] = True
        for vocabulary, offered in (("VOC", voc), ("full", present | True), ("present", present)):
            target = one.target
            if vocabulary == "VOC":
                counted = (target != ignore) & voc[target.clamp(max=count - 1)]
                target = target.masked_fill(~counted, ignore)
            if (target == ignore).all():
                continue
            names = offered.nonzero()[:, 0]
            labels = segmenter.labels(one.encoded, every[names], tuple(target.shape))
            metrics[vocabulary].update(names[labels][None], target[None])
    return {f"mIoU {v}": mean_iou(metrics[v].confmat) * 100 for v in VOCABULARIES}


def fallbacks(photographs: list[Photograph], ignore: int) -> str:
    """How often a class of a photograph has to be said, for no other fold shows it."""
    pairs, alone = [], []
    for i, one in enumerate(photographs):
        for k in present_classes(one.target, ignore):
            pairs.append((i, k))
            if not any(k in p.shown for j, p in enumerate(photographs) if j % FOLDS != i % FOLDS):
                alone.append((i, k))
    return (
        f"{len({k for _, k in pairs})} classes occur, {len(pairs)} times in a photograph; "
        f"{len(alone)} times, of {len({k for _, k in alone})} classes, the word counts"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata"
    parser.add_argument("--data", type=Path, default=default, help="folder with coco100")
    parser.add_argument("--checkpoint", required=True, help="a run whose words are compared with")
    parser.add_argument("--out", type=Path, default=Path("outputs/exemplars"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 5], help="exemplars a class")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5], help="beside words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-calibration", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    calibration = None if args.no_calibration else "auto"
    model = Talk2DINO.from_pretrained(args.checkpoint, "cpu", calibration=calibration)
    benchmark = coco100(args, write_classes(args.data, args.out))
    names, ignore = benchmark.class_list.names, benchmark.ignore_index
    voc = torch.tensor([name in voc_names() for name in names])
    photographs = read(benchmark, model, args.out / f"{model.vision.name}.pt")
    psi, calibrated = model.projection, model.calibration
    reference = None if calibrated is None else Spread.of(calibrated.reference(psi).tokens)

    def scored(rows: Tensor, mean: Tensor | None = None) -> Tensor:
        if calibrated is not None:
            return calibrated.score_rows(rows, names, psi)
        return rows if mean is None else with_offsets(rows, rows @ mean)

    said = model.embed_classes(names).rows
    words = scored(said)
    table: dict[str, list[dict[str, float]]] = {
        "words": [scores(photographs, model, lambda _: words, voc, ignore)]
    }
    for count in args.counts:
        for seed in args.seeds:
            found = shown_rows(photographs, len(names), count, seed, reference)
            for weight in (1.0, *args.weights):

                def rows(index: int, found: list[Shown] = found,
                         weight: float = weight) -> Tensor:  # fmt: skip
                    mixed = said.clone()
                    drawn, mean = found[index % FOLDS]
                    for k, row in drawn.items():
                        mixed[k] = F.normalize(torch.lerp(said[k], row, weight), dim=0)
                    return scored(mixed, mean)

                name = f"{count} shown" + ("" if weight == 1 else f", {weight:g} beside words")
                figures = scores(photographs, model, rows, voc, ignore)
                table.setdefault(name, []).append(figures)
                print(name, seed, {k: round(v, 2) for k, v in figures.items()}, flush=True)
    print(fallbacks(photographs, ignore))
    columns = [f"mIoU {v}" for v in VOCABULARIES]
    made = Table("rows", *columns, title=str(args.checkpoint))
    for name, runs in table.items():
        made.add_row(name, *(shown([run[column] for run in runs]) for column in columns))
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
