"""The yardstick: train on Flickr8k captions, segment and score 100 COCO photographs.

For every recipe: text→image recall on the validation split, mIoU with the 20 VOC classes, with the
full vocabulary and with the classes present in each image, and the mean over classes of the
patch-level AUC (the score of a class on its own patches against all other labelled patches).
Extraction is kept and resumed.

    python benchmarks/real_data.py
    python benchmarks/real_data.py --train all --recipes words --seeds 0 1 2 --calibrate
    python benchmarks/real_data.py --recipes dense 'dense@similarity.temperature=0.05'
    python benchmarks/real_data.py --recipes dense --onnx    # exported, float32 beside 8 bits
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from talk2dino import Talk2DINO
from talk2dino.alignment.class_names import embed_class_names
from talk2dino.datasets.benchmarks.base import present_classes
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.evaluation.images import side_by_side
from talk2dino.evaluation.metrics import mean_iou, mean_iou_metric
from talk2dino.segmentation.overlay import overlay

BASE = {
    "max_score": ["experiment=vits_infonce"],
    "dense": ["experiment=vits_dense"],
    "words": ["experiment=vits_words"],
}
HALVES = ("tune", "report")
VOCABULARIES = ("VOC", "full", "present")
VOC = (
    "airplane bicycle bird boat bottle bus car cat chair cow,dining table,dog horse motorcycle "
    "person,potted plant,sheep couch train tv"
)
PLAIN_NAMES = {
    "floor-wood": "wooden floor",
    "playingfield": "playing field",
    "door-stuff": "door",
    "wall-wood": "wooden wall",
    "window-blind": "window blind",
}


def plain_name(name: str) -> str:
    """How a person says a COCO panoptic class: `wall-other-merged` is a wall."""
    if name in PLAIN_NAMES:
        return PLAIN_NAMES[name]
    for suffix in ("-merged", "-other", "-stuff"):
        name = name.removesuffix(suffix)
    thing, _, kind = name.partition("-")
    return f"{kind} {thing}" if kind else thing


def voc_names() -> set[str]:
    groups = [group.strip() for group in VOC.split(",")]
    return {
        name
        for group in groups
        for name in ([group] if group in ("dining table", "potted plant") else group.split())
    }


def run(module: str, *overrides: str) -> float:
    """Run an entry point as a user would; returns seconds."""
    command = [sys.executable, "-m", f"talk2dino.{module}", *overrides]
    print("$ python -m", f"talk2dino.{module}", *overrides, flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def write_captions(data: Path, out: Path) -> Path:
    """The captions of `train` and `more` as one file, with paths from the folder of both."""
    merged: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for split in ("train", "more"):
        file = data / "flickr8k" / "annotations" / f"captions_{split}.json"
        content = json.loads(file.read_text())
        for image in content["images"]:
            merged["images"].append(image | {"file_name": f"{split}/{image['file_name']}"})
        merged["annotations"] += content["annotations"]
    path = out / "captions_all.json"
    path.write_text(json.dumps(merged))
    return path


def extract(data: Path, out: Path, split: str, precision: str, limit: int | None) -> float:
    flickr = data / "flickr8k"
    annotations, images = flickr / "annotations" / f"captions_{split}.json", flickr / "images"
    if split == "all":
        annotations = write_captions(data, out)
    return run(
        "extract",
        "source=coco_captions",
        f"source.annotations={annotations}",
        f"source.images={images if split == 'all' else images / split}",
        f"source.limit={limit or 'null'}",
        "vision=dinov2_vits14",
        "text=minilm",
        f"store={out / f'store-{split}'}",
        f"split={split}",
        f"precision={precision}",
        f"hydra.run.dir={out / f'extract-{split}'}",
    )


def write_classes(data: Path, out: Path) -> Path:
    """All classes by plain names; beside them `classes-VOC.json`, where the others do not count."""
    content = json.loads((data / "coco100" / "classes.json").read_text())
    for entry in content["classes"]:
        entry["name"] = plain_name(entry["name"])
    path = out / "classes.json"
    path.write_text(json.dumps(content))
    voc = [entry for entry in content["classes"] if entry["name"] in voc_names()]
    others = [entry["id"] for entry in content["classes"] if entry not in voc]
    fewer = {"classes": voc, "unlabeled": [content["unlabeled"], *others]}
    (out / "classes-VOC.json").write_text(json.dumps(fewer))
    return path


def evaluate(
    data: Path, folder: Path, classes: Path, vocabulary: str, name: str, *more: str
) -> dict[str, Any]:
    """Score of a run, kept in `folder/evaluate-VOCABULARY-name`."""
    target = folder / f"evaluate-{vocabulary}-{name}"
    if vocabulary == "VOC":
        classes, vocabulary = classes.with_name("classes-VOC.json"), "full"
    run(
        "evaluate",
        f"checkpoint={folder}",
        "benchmark=custom",
        f"benchmark.root={data / 'coco100'}",
        "benchmark.images=images",
        "benchmark.masks=masks",
        f"benchmark.classes={classes.resolve()}",
        f"benchmark.vocabulary={vocabulary}",
        "trainer=auto",
        f"hydra.run.dir={target}",
        *more,
    )
    return dict(json.loads((target / "results.json").read_text()))


def patches_with_labels(
    benchmark: FolderBenchmark, model: Talk2DINO, side: int = 448
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit patch tokens [N, D] of all images, squashed square, and their majority class [N]."""
    patch, tokens, labels = model.vision.patch_size, [], []
    for index in range(len(benchmark)):
        sample = benchmark.sample(index)
        image = squashed(sample.image, side)
        tokens.append(F.normalize(model.vision(image).patch_tokens[0], dim=-1))
        mask = F.interpolate(sample.target[None, None].float(), (side, side), mode="nearest")[0, 0]
        cells = mask.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2)
        labels.append(cells.mode(dim=-1).values.flatten().long())
    return torch.cat(tokens), torch.cat(labels)


def coco100(args: argparse.Namespace, classes: Path) -> FolderBenchmark:
    return FolderBenchmark(
        name="coco100",
        images=str(args.data / "coco100" / "images"),
        masks=str(args.data / "coco100" / "masks"),
        classes=str(classes),
    )


def patch_auc(scores: np.ndarray, labels: np.ndarray, ignore: int) -> dict[int, float]:
    """AUC of every class that has patches: scores [N, K], labels [N]."""
    kept = labels != ignore
    scores, labels = scores[kept], labels[kept]
    result = {}
    for k in np.unique(labels):
        own = labels == k
        positive, negative = own.sum(), (~own).sum()
        ranks = rankdata(scores[:, k])[own].sum()
        result[int(k)] = float((ranks - positive * (positive + 1) / 2) / (positive * negative))
    return result


def every_second(
    scores: np.ndarray, labels: np.ndarray, start: int, benchmark: FolderBenchmark
) -> dict[int, float]:
    """The `patch_auc` of every second photograph, from the one at `start` on."""
    count = len(benchmark)
    kept = scores.reshape(count, -1, scores.shape[1])[start::2].reshape(-1, scores.shape[1])
    return patch_auc(kept, labels.reshape(count, -1)[start::2].ravel(), benchmark.ignore_index)


def run_folder(args: argparse.Namespace, recipe: str, seed: int) -> Path:
    name = recipe.replace("@", "-").replace("/", "_").replace(",", "_").replace("=", "_")
    return Path(args.out / f"{name}-{args.train}-seed{seed}")


def measure(
    args: argparse.Namespace, recipe: str, seed: int, classes: Path, cache: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Train once, and score it as it is and with each of `--with`: figures by the row's name."""
    base, _, overrides = recipe.partition("@")
    folder = run_folder(args, recipe, seed)
    store = args.out / f"store-{args.train}"
    seconds = run(
        "train",
        *BASE[base],
        f"store={store}",
        f"val_store={args.out / 'store-val'}",
        "trainer=auto",
        f"trainer.check_val_every_n_epoch={args.validate_every}",
        f"seed={seed}",
        *([f"trainer.max_epochs={args.epochs}"] if args.epochs else []),
        f"hydra.run.dir={folder}",
        *filter(None, overrides.split(",")),
    )
    validation = json.loads((folder / "metrics.json").read_text())["validation"][-1]
    model = Talk2DINO.from_pretrained(folder, device="cpu")
    benchmark = coco100(args, classes)
    if "patches" not in cache:
        cache["patches"] = patches_with_labels(benchmark, model)
    tokens, labels = cache["patches"]
    rows, _ = embed_class_names(
        [spec.synonyms for spec in benchmark.class_list.prompted], model.text, model.projection
    )
    scores = (tokens @ rows.T).numpy()
    auc = patch_auc(scores, labels.numpy(), benchmark.ignore_index)
    names, voc = benchmark.class_list.names, voc_names()
    per_class = {names[k]: value for k, value in sorted(auc.items(), key=lambda pair: pair[1])}
    (folder / "auc.json").write_text(json.dumps(per_class, indent=1))
    figures = {f"R@{k}": validation[f"val/text_to_image/recall@{k}"] for k in (1, 5, 10)}
    figures["AUC VOC"] = 100 * float(np.mean([v for k, v in auc.items() if names[k] in voc]))
    figures["AUC"] = 100 * float(np.mean(list(auc.values())))
    figures |= {
        f"AUC, {half}": 100 * float(np.mean(list(ranked.values())))
        for start, half in enumerate(HALVES)
        for ranked in [every_second(scores, labels.numpy(), start, benchmark)]
    }
    figures["train s"] = seconds
    found = {recipe: figures}
    if not args.no_miou:
        figures |= scored(args, folder, classes, "plain", "calibration=none")
        if args.calibrate:
            run("calibrate", f"checkpoint={folder}", f"store={store}")
        for settings in args.settings:
            row = scored(args, folder, classes, settings, *settings.split(","))
            found[f"{recipe} + {settings}"] = row
    (folder / "figures.json").write_text(json.dumps(found, indent=1))
    return found


def scored(
    args: argparse.Namespace, folder: Path, classes: Path, name: str, *more: str
) -> dict[str, float]:
    """Scores with each vocabulary; `more` are settings of the evaluation."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    given = [f"benchmark.split={args.split}"] if args.split else []
    found = {}
    for v in VOCABULARIES:
        result = evaluate(
            args.data, folder, classes, v, plain, "pictures=12", "label_maps=true", *given, *more
        )
        found[f"mIoU {v}"] = result["miou"]
        if not args.split:
            maps = folder / f"evaluate-{v}-{plain}" / "label_maps"
            found |= {f"mIoU {v}, {half}": miou for half, miou in of_halves(args, classes, v, maps)}
    return found


def of_halves(
    args: argparse.Namespace, classes: Path, vocabulary: str, maps: Path
) -> Iterator[tuple[str, float]]:
    """Mean IoU of the photographs with even places and of those with odd ones, from label maps."""
    if vocabulary == "VOC":
        classes = classes.with_name("classes-VOC.json")
    benchmark = coco100(args, classes)
    for start, half in enumerate(HALVES):
        metric = mean_iou_metric(len(benchmark.class_list.names), benchmark.ignore_index)
        for index in range(start, len(benchmark), 2):
            sample = benchmark.sample(index)
            with Image.open(maps / f"{sample.name}.png") as opened:
                labels = torch.from_numpy(np.asarray(opened).astype(np.int64))
            metric.update(labels[None], sample.target[None].long())
        yield half, 100 * mean_iou(metric.confmat)


def write_panels(
    args: argparse.Namespace, classes: Path, before: str, after: str, file: Path, count: int = 8
) -> None:
    """Truth and two rows of label maps of eight photographs, without the photographs.

    Args:
        args: where the data is.
        classes: all classes.
        before: names the folders `RUN/evaluate-present-SETTINGS`.
        after: likewise.
        file: the picture to write.
        count: photographs, evenly spaced.
    """
    benchmark = coco100(args, classes)
    names, rows = benchmark.class_list.names, []
    for index in range(0, len(benchmark), len(benchmark) // count)[:count]:
        sample = benchmark.sample(index)
        present = present_classes(sample.target, benchmark.ignore_index)
        maps = [sample.target.numpy()]
        for folder in (before, after):
            with Image.open(Path(folder) / "label_maps" / f"{sample.name}.png") as opened:
                maps.append(np.asarray(opened).astype(np.int64))
        place = np.full(max(benchmark.ignore_index, len(names)) + 1, 255)
        place[present] = np.arange(len(present))
        blank = Image.new("RGB", (sample.image.shape[2], sample.image.shape[1]), "white")
        shown = [
            overlay(blank, torch.from_numpy(place[m]), [names[k] for k in present], alpha=0.8)
            for m in maps
        ]
        for part in shown:
            part.thumbnail((320, 320))
        rows.append(side_by_side(shown, gap=8))
    left, right = rows[::2], rows[1::2]
    lines = [side_by_side(pair, gap=24) for pair in zip(left, right, strict=True)]
    size = max(line.width for line in lines), sum(line.height + 12 for line in lines)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for line in lines:
        sheet.paste(line, (0, top))
        top += line.height + 12
    sheet.quantize(64).save(file, optimize=True)


def write_split(args: argparse.Namespace) -> None:
    """The names of every second photograph of coco100, to tune on one half only."""
    names = sorted(path.name for path in (args.data / "coco100" / "images").iterdir())
    start = HALVES.index(args.half)
    args.split = (args.out / f"{args.half}.txt").resolve()
    args.split.write_text("\n".join(names[start::2]) + "\n")


def squashed(image: torch.Tensor, side: int) -> torch.Tensor:
    """`[3, H, W]` uint8 to `[1, 3, side, side]` in 0..1."""
    return F.interpolate(image[None].float() / 255, (side, side), mode="bilinear")


def measure_onnx(args: argparse.Namespace, folder: Path, classes: Path) -> Table:
    """Export, and segment each photograph as one window: mIoU, seconds (interleaved), megabytes."""
    import onnxruntime

    out = folder / "onnx"
    given = [f"checkpoint={folder}", f"classes={classes.resolve()}", f"output={out}", "int8=true"]
    run("export", *given, f"image_size={args.window}", f"hydra.run.dir={folder / 'export'}")
    benchmark = coco100(args, classes)
    count, options = len(benchmark.class_list.names), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    files = [out / "segmenter.onnx", out / "segmenter-int8.onnx"]
    networks = [onnxruntime.InferenceSession(str(file), options) for file in files]
    seconds: list[list[float]] = [[], []]
    metrics = [{v: mean_iou_metric(count) for v in ("full", "present")} for _ in files]
    for index in range(len(benchmark)):
        sample = benchmark.sample(index)
        pixels = squashed(sample.image, args.window).numpy()
        hidden = {"full": torch.zeros(count).bool(), "present": torch.ones(count).bool()}
        hidden["present"][present_classes(sample.target, benchmark.ignore_index)] = False
        for network, times, counted in zip(networks, seconds, metrics, strict=True):
            start = time.perf_counter()
            scores = torch.from_numpy(network.run(None, {"image": pixels})[0])
            times.append(time.perf_counter() - start)
            for vocabulary, metric in counted.items():
                offered = scores.masked_fill(hidden[vocabulary][:, None, None], -1)
                best = offered.argmax(1, keepdim=True)
                labels = F.interpolate(best.float(), sample.target.shape, mode="nearest-exact")
                metric.update(labels[0].long(), sample.target[None])
    table = Table("file", "mIoU full", "mIoU present", "s per image", "MB", title=folder.name)
    for file, times, counted in zip(files, seconds, metrics, strict=True):
        scored = [f"{100 * mean_iou(metric.confmat):.2f}" for metric in counted.values()]
        size = file.stat().st_size / 1e6
        table.add_row(file.name, *scored, f"{np.median(times):.3f}", f"{size:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata"
    parser.add_argument("--data", type=Path, default=default, help="folder with flickr8k, coco100")
    parser.add_argument("--out", type=Path, default=Path("outputs/real_data"))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["max_score", "dense"],
        help="max_score, dense or words; overrides behind @: dense@loss.logit_scale=30",
    )
    parser.add_argument(
        "--train", choices=["train", "all"], default="train", help="4,000 photographs, or 7,591"
    )
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--validate-every", type=int, default=1, help="epochs")
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--precision", default="bf16", help="of extraction: 32 or bf16")
    parser.add_argument("--no-miou", action="store_true", help="skip the segmentations")
    parser.add_argument("--calibrate", action="store_true", help="with the patches of the store")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        help="of further evaluations, each a row: refinement=knn,calibration=auto",
    )
    parser.add_argument(
        "--panels",
        nargs=3,
        metavar=("FILE", "BEFORE", "AFTER"),
        help="draw label maps of eight photographs, of two folders RUN/evaluate-present-…, and end",
    )
    parser.add_argument("--half", choices=HALVES, help="of the 100; default: all, and each half")
    parser.add_argument("--onnx", action="store_true", help="also compare the exported files")
    parser.add_argument("--window", type=int, default=448, help="of the exported files, pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if not (args.data / "flickr8k").is_dir():
        raise SystemExit(f"error: --data={args.data}: no folder flickr8k in it")
    args.out.mkdir(parents=True, exist_ok=True)
    args.split = None
    if args.panels:
        file, before, after = args.panels
        write_panels(args, write_classes(args.data, args.out), before, after, Path(file))
        return
    if args.half:
        write_split(args)
    seconds = sum(
        extract(args.data, args.out, split, args.precision, args.limit)
        for split in (args.train, "val")
    )
    classes = write_classes(args.data, args.out)
    cache: dict[str, Any] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for recipe in args.recipes:
        for seed in args.seeds:
            for name, figures in measure(args, recipe, seed, classes, cache).items():
                rows.setdefault(name, []).append(figures)
    columns = list(dict.fromkeys(key for runs in rows.values() for key in runs[0]))
    all_of_them = [column for column in columns if ", " not in column]
    halves = [column for column in columns if ", " in column]
    tables = [table_of(rows, all_of_them, f"Flickr8k → coco100; extraction {seconds:.0f} s")]
    if halves:
        tables.append(table_of(rows, halves, "each half of coco100"))
    tables += [
        measure_onnx(args, run_folder(args, recipe, args.seeds[0]), classes)
        for recipe in args.recipes
        if args.onnx
    ]
    Console(width=160).print(*tables)


def table_of(rows: dict[str, list[dict[str, float]]], columns: list[str], title: str) -> Table:
    table = Table("recipe", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, runs in rows.items():
        table.add_row(name, *(shown([run.get(column) for run in runs]) for column in columns))
    return table


def shown(values: list[float | None]) -> str:
    """Mean and, of several seeds, the standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {np.std(known, ddof=1):.2f}" if len(known) > 1 else ""
    return f"{np.mean(known):.2f}{spread}"


if __name__ == "__main__":
    main()
