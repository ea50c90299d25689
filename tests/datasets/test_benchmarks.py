"""The eight benchmarks against what mmsegmentation reads, and against a loop over pixels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from talk2dino.alignment.class_names import embed_class_names
from talk2dino.config import command
from talk2dino.config.checks import check_targets, config_folder
from talk2dino.config.schemas import register_schema
from talk2dino.datasets.benchmarks.classes import read_classes, shipped_lists
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.datasets.benchmarks.public_datasets import convert_coco_object
from talk2dino.evaluation.metrics import mean_iou_metric, per_class_iou
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation import Segmenter
from tests.helpers.encoders import HashText, MeanColorEncoder, NamedColors, directions
from tests.helpers.goldens import golden_json
from tests.helpers.layouts import IGNORED, LAYOUTS, write_layout
from tests.helpers.pipeline import TRAIN, run

EIGHT = ["voc", "voc_bg", "context", "context_bg", "stuff", "coco_object", "cityscapes", "ade"]
SMALL: dict[str, Any] = {"short_side": 80, "window": 80, "stride": 40, "input_size": 80}
PAPER = {  # the paper's table: ViT-B without and with PAMR, ViT-L the same
    "voc": (87.1, 88.5, 87.1, 89.8),
    "context": (39.8, 42.4, 39.1, 42.7),
    "stuff": (28.1, 30.2, 27.0, 29.6),
    "cityscapes": (36.6, 38.1, 35.8, 38.4),
    "ade": (21.1, 22.5, 21.1, 22.9),
    "voc_bg": (61.5, 65.8, 60.1, 66.1),
    "context_bg": (35.1, 37.7, 34.2, 37.3),
    "coco_object": (41.0, 45.1, 37.6, 42.3),
}


def names_of(golden: str) -> list[str]:
    return [name.strip() for name in golden_json("classes")[golden]]  # ade150 has "bed "


def compose(name: str, *overrides: str) -> DictConfig:
    register_schema("evaluate")
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("evaluate", ["checkpoint=c", f"benchmark={name}", *overrides])
    check_targets(config)
    return config


def build(name: str, root: Path, *overrides: str) -> FolderBenchmark:
    small = [f"benchmark.{key}={value}" for key, value in SMALL.items()]
    config = compose(name, f"benchmark.root={root}", *small, *overrides)
    made: FolderBenchmark = command.build(config.benchmark)
    return made


def colors(count: int) -> NDArray[np.float32]:
    """[count, 3] what `MeanColorEncoder` maps to `directions`, 0..255."""
    return (127.5 + 120 * directions(count)).numpy()


def brute_force(
    meaning: dict[str, NDArray[np.int64]], predicted: dict[str, NDArray[np.int64]], count: int
) -> tuple[list[float | None], float]:
    """mmsegmentation's IoU per class (None where the union is empty) and their mean, in percent."""
    hits, union = [0] * count, [0] * count
    for name, truth in meaning.items():
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                want, got = int(truth[y, x]), int(predicted[name][y, x])
                if want == IGNORED:
                    continue
                if want == got:
                    hits[want] += 1
                    union[want] += 1
                else:
                    union[want] += 1
                    union[got] += 1
    ious = [100 * h / u if u else None for h, u in zip(hits, union, strict=True)]
    return ious, float(np.mean([iou for iou in ious if iou is not None]))


def predictions(name: str, bench: FolderBenchmark, vectors: Tensor) -> dict[str, NDArray[np.int64]]:
    """Label maps by a segmenter with the settings that the original has for this benchmark."""
    background = name in ("voc_bg", "context_bg", "coco_object")
    segmenter = Segmenter(
        MeanColorEncoder(),
        background_cleaning=name in ("voc_bg", "coco_object"),
        background_threshold=0.55 if background else None,
        **SMALL,
    )
    text = F.normalize(vectors[int(background) :], dim=-1)
    samples = [bench.sample(index) for index in range(len(bench))]
    return {sample.name: segmenter(sample.image, text).labels.numpy() for sample in samples}


def prepare(layout: str, root: Path) -> tuple[dict[str, NDArray[np.int64]], Tensor, list[str]]:
    """Write a dataset; what its pixels mean, the class vectors and the class names."""
    names = names_of(LAYOUTS[layout].golden)
    vectors = directions(len(names))
    meaning = write_layout(layout, root, colors(len(names)))
    if layout == "coco_object":
        convert_coco_object(root / "annotations", root / "annotations")
    return meaning, vectors, names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_maps_mean_what_the_files_say(layout: str, tmp_path: Path) -> None:
    meaning, vectors, names = prepare(layout, tmp_path)
    name = layout.removesuffix("_raw")
    bench = build(name, tmp_path)
    bench.check()
    assert bench.class_list.names == names
    samples = [bench.sample(index) for index in range(len(bench))]
    assert [sample.name for sample in samples] == list(meaning)
    for sample in samples:
        assert np.array_equal(sample.target.numpy(), meaning[sample.name])
    predicted = predictions(name, bench, vectors)
    metric = mean_iou_metric(len(names))
    for sample in samples:
        metric.update(torch.from_numpy(predicted[sample.name])[None], sample.target[None])
    want, mean = brute_force(meaning, predicted, len(names))
    got = [None if iou is None else 100 * iou for iou in per_class_iou(metric.confmat)]
    assert got == pytest.approx(want)
    assert 100 * float(metric.compute()) == pytest.approx(mean, abs=1e-4)
    assert mean > 5


@pytest.mark.parametrize("layout", ["voc", "cityscapes_raw", "coco_object"])
def test_the_command_on_a_miniature(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meaning, vectors, names = prepare(layout, tmp_path / "data")
    model = SimpleNamespace(
        calibration=None,
        vision=MeanColorEncoder(),
        text=HashText(),
        projection=NamedColors(names, vectors),
    )
    monkeypatch.setattr(Talk2DINO, "from_pretrained", lambda *_, **__: model)
    name = layout.removesuffix("_raw")
    run(
        "evaluate",
        "checkpoint=stub",
        f"benchmark={name}",
        f"benchmark.root={tmp_path / 'data'}",
        *[f"benchmark.{key}={value}" for key, value in SMALL.items()],
        "num_workers=0",
        "pictures=0",
        *TRAIN,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    bench = build(name, tmp_path / "data")
    want, mean = brute_force(meaning, predictions(name, bench, vectors), len(names))
    assert (results["benchmark"], results["images"]) == (name, 2)
    assert list(results["per_class"]) == names
    assert list(results["per_class"].values()) == pytest.approx(want, abs=1e-4)
    assert results["miou"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("name", EIGHT)
def test_the_configs_are_the_originals(name: str) -> None:
    node = compose(name).benchmark
    layout = LAYOUTS[name]
    dataset = golden_json("datasets")[layout.golden]
    classes = read_classes(node.classes)
    assert classes.names == names_of(layout.golden)
    assert classes.has_background == dataset["first_class_is_background"]
    assert [spec.value for spec in classes.classes] == list(range(dataset["num_classes"]))
    assert all(spec.synonyms == (spec.name,) for spec in classes.classes)
    palette = [list(spec.color or ()) for spec in classes.classes]
    first = int(name == "context_bg")  # mmsegmentation paints its background grey, here black
    assert palette[first:] == golden_json("palettes")[layout.golden][first:]
    for key, golden in (
        ("image_suffix", "img_suffix"),
        ("mask_suffix", "seg_map_suffix"),
        ("reduce_zero_label", "reduce_zero_label"),
        ("ignore_index", "ignore_index"),
    ):
        assert node[key] == dataset[golden], key
    assert (node.images, node.masks, node.split) == (layout.images, layout.masks, layout.split)
    assert node.background_cleaning == layout.cleaning
    protocol = (node.short_side, node.long_side, node.window, node.stride, node.input_size)
    assert protocol == (448, 2048, 448, 224, 448)
    small, large = node.reference["Talk2DINO ViT-B"], node.reference["Talk2DINO ViT-L"]
    assert (small.plain, small.pamr, large.plain, large.pamr) == PAPER[name]
    assert node.root.startswith("data/")


def test_the_threshold_depends_on_the_model(tmp_path: Path) -> None:
    prepare("voc_bg", tmp_path)
    bench = build("voc_bg", tmp_path)
    assert [bench.threshold(width) for width in (None, 384, 768, 1024)] == [0.55, 0.55, 0.55, 0.54]
    assert build("voc", tmp_path).threshold(768) is None
    plain = build("voc_bg", tmp_path, "benchmark.background_threshold=0.4")
    assert plain.threshold(1024) == 0.4
    small = build("voc_bg", tmp_path, "+benchmark.background_threshold.ViT-S=0.5")
    assert [small.threshold(width) for width in (384, 768)] == [0.5, 0.55]
    for wrong in ("{ViT-B: 0.5}", "{default: 0.5, vitl: 0.4}"):
        with pytest.raises(Exception, match=r"background_threshold=.*default is needed") as error:
            build(
                "voc_bg", tmp_path, "~benchmark.background_threshold",
                f"+benchmark.background_threshold={wrong}",
            )  # fmt: skip
        assert "\n" not in str(error.value)


def test_shipped_lists_and_own_files(tmp_path: Path) -> None:
    assert set(shipped_lists()) >= {"voc", "context", "ade", "cityscapes", "coco_things"}
    assert read_classes("background+voc").names[:2] == ["background", "aeroplane"]
    (tmp_path / "mine.txt").write_text("\ufeffcat; kitten; #ff0010\ndog\n", encoding="utf-8")
    cat, dog = read_classes(tmp_path / "mine.txt").classes
    assert (cat.synonyms, cat.color, dog.color) == (("cat", "kitten"), (255, 0, 16), None)
    (tmp_path / "mine.json").write_text('[{"name": "cat", "color": [1, 2, 3], "synonyms": null}]')
    (cat,) = read_classes(tmp_path / "mine.json").classes
    assert (cat.synonyms, cat.color) == (("cat",), (1, 2, 3))


# --- benchmark=custom -----------------------------------------------------------------------------


def write_custom(root: Path, mask: Image.Image, count: int = 1) -> Path:
    for number in range(count):
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", mask.size, (9, 99, 199)).save(root / "images" / f"{number}.jpg")
        mask.save(root / "masks" / f"{number}.png")
    return root


def custom(root: Path, *overrides: str) -> FolderBenchmark:
    return build("custom", root, "benchmark.images=images", "benchmark.masks=masks", *overrides)


def test_coloured_label_maps(tmp_path: Path) -> None:
    pixels = np.array([[[128, 0, 0], [0, 0, 128], [224, 224, 192]]], np.uint8)
    root = write_custom(tmp_path, Image.fromarray(pixels))
    palette = "benchmark.palette=[[128,0,0],'#000080']"
    ignored = "benchmark.ignore_colors=[[224,224,192]]"
    classes = "benchmark.classes=[cat,dog]"
    want = [[0, 1, 255]]
    assert custom(root, classes, palette, ignored).sample(0).target.tolist() == want
    # a palette file is read by its colours too, whatever order they are stored in
    Image.fromarray(pixels).quantize(8).save(root / "masks" / "0.png")
    assert Image.open(root / "masks" / "0.png").mode == "P"
    assert custom(root, classes, palette, ignored).sample(0).target.tolist() == want
    (root / "c.txt").write_text("cat; #800000\ndog; #000080\n")
    listed = custom(root, "benchmark.classes=c.txt", "benchmark.palette=classes", ignored)
    assert listed.sample(0).target.tolist() == want


def test_label_values_are_mapped_then_reduced(tmp_path: Path) -> None:
    root = write_custom(tmp_path, Image.fromarray(np.array([[0, 1, 2, 7, 255]], np.uint8)))
    classes = "benchmark.classes=[cat,dog]"
    plain = custom(root, classes, "benchmark.label_map={2:255,7:1}")
    assert plain.sample(0).target.tolist() == [[0, 1, 255, 1, 255]]
    reduced = custom(root, classes, "benchmark.label_map={7:2}", "benchmark.reduce_zero_label=true")
    assert reduced.sample(0).target.tolist() == [[255, 0, 1, 1, 255]]


def test_synonyms_take_the_maximum(tmp_path: Path) -> None:
    """Three prompts, two classes: the label is that of the class with the best prompt."""
    root = write_custom(tmp_path, Image.new("L", (16, 16)))
    bench = custom(root, "benchmark.classes=[{name:cat,synonyms:[cat,kitten]},dog]")
    synonyms = [spec.synonyms for spec in bench.class_list.prompted]
    assert synonyms == [("cat", "kitten"), ("dog",)]
    vectors = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    psi = NamedColors(["cat", "kitten", "dog"], vectors)
    text, row_classes = embed_class_names(synonyms, HashText(), psi)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[2] = 255  # blue: what the prompt "kitten" means
    image[0, :, 8:] = 255
    image[2, :, 8:] = 0
    segmenter = Segmenter(
        MeanColorEncoder(), short_side=16, long_side=16, window=16, stride=16, input_size=16
    )
    result = segmenter(image, text, row_classes=row_classes, return_scores=True)
    assert result.scores is not None and result.scores.shape[0] == 2
    assert (result.labels[:, :4] == 0).all() and (result.labels[:, 12:] == 1).all()


def test_subfolders_and_split(tmp_path: Path) -> None:
    for place in ("a/x", "b/x", "b/y"):
        for folder, end in (("images", ".png"), ("masks", "_label.png")):
            path = tmp_path / folder / f"{place}{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(path)
    keys = ["benchmark.classes=[cat]", "benchmark.recursive=true"]
    keys += ["benchmark.mask_suffix=_label.png", "benchmark.image_suffix=.png"]
    bench = custom(tmp_path, *keys)
    assert [bench.sample(i).name for i in range(len(bench))] == ["a/x", "b/x", "b/y"]
    (tmp_path / "val.txt").write_text("b/y\n\na/x\n")
    first = custom(tmp_path, *keys, "benchmark.limit=1")
    assert first.sample(0).name == "a/x"  # a name says the same image, however many are taken
    bench = custom(tmp_path, *keys, "benchmark.split=val.txt")
    assert [bench.sample(i).name for i in range(len(bench))] == ["b/y", "a/x"]


def test_a_benchmark_is_added_by_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the package: `--config-dir DIR benchmark=kittens`."""
    meaning = write_layout("ade", tmp_path / "data", colors(2))
    (tmp_path / "conf" / "benchmark").mkdir(parents=True)
    (tmp_path / "conf" / "benchmark" / "kittens.yaml").write_text(
        "defaults: [custom, _self_]\n"
        "name: kittens\n"
        f"root: {tmp_path / 'data'}\n"
        "images: images/validation\n"
        "masks: annotations/validation\n"
        "classes: [{name: cat, synonyms: [cat, kitten]}, dog]\n"
        "reduce_zero_label: true\n"
        "reference: {somebody: 12.5}\n"
        + "".join(f"{key}: {value}\n" for key, value in SMALL.items())
    )
    psi = NamedColors(["cat", "dog", "kitten"], directions(2)[[0, 1, 0]])
    model = SimpleNamespace(
        vision=MeanColorEncoder(), text=HashText(), projection=psi, calibration=None
    )
    monkeypatch.setattr(Talk2DINO, "from_pretrained", lambda *_, **__: model)
    run(
        "evaluate",
        "--config-dir",
        tmp_path / "conf",
        "checkpoint=stub",
        "benchmark=kittens",
        "num_workers=0",
        "pictures=0",
        *TRAIN,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    bench = FolderBenchmark(
        name="twin",
        root=str(tmp_path / "data"),
        images="images/validation",
        masks="annotations/validation",
        classes=["cat", "dog"],
        reduce_zero_label=True,
    )
    want, mean = brute_force(meaning, predictions("kittens", bench, directions(2)), 2)
    assert (results["benchmark"], results["images"]) == ("kittens", 2)
    assert list(results["per_class"].values()) == pytest.approx(want, abs=1e-4)
    assert results["miou"] == pytest.approx(mean, abs=1e-4)
