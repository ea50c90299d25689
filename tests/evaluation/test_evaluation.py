"""Evaluation: counted as a loop over pixels counts, the same for any number of processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.datasets.benchmarks.classes import read_classes
from talk2dino.datasets.mosaic import MosaicBenchmark
from talk2dino.datasets.pictures import read_image
from talk2dino.errors import ConfigError, DataError, ResultWarning, UserError
from talk2dino.evaluation.datamodule import SegmentationDataModule
from talk2dino.evaluation.settings import check_encoder_precision
from tests.helpers.encoders import MeanColorEncoder
from tests.helpers.evaluations import (
    COLORS,
    NAMES,
    SMALL,
    benchmark,
    evaluate,
    evaluate_mosaic,
    settings,
    write_benchmark,
)
from tests.helpers.pipeline import fails, need, run
from tests.helpers.ranks import fork_what_lightning_spawns, two_ranks


def scores_of(image: Tensor, bench: Benchmark) -> Tensor:
    """Class scores [3, H, W] of the chain under test, without any labels."""
    from talk2dino.segmentation import Segmenter

    segmenter = Segmenter(MeanColorEncoder(), **SMALL)
    text = torch.nn.functional.normalize(COLORS, dim=-1)
    scores = segmenter(image, text, return_scores=True).scores
    assert scores is not None
    return scores


def brute_force(bench: Benchmark, present_only: bool = False) -> dict[str, Any]:
    """The confusion matrix pixel by pixel, and its figures."""
    matrix = np.zeros((4, 4), int)
    for index in range(len(bench)):
        sample = bench.sample(index)
        scores = scores_of(sample.image, bench).numpy()
        present = set(sample.target.unique().tolist())
        for y, x in np.ndindex(*sample.target.shape):
            truth = int(sample.target[y, x])
            if truth == 255:
                continue
            offered = [k for k in (1, 2, 3) if not present_only or k in present]
            best = max(offered, key=lambda k: scores[k - 1, y, x])
            guess = best if scores[best - 1, y, x] > 0.6 else 0
            matrix[truth, guess] += 1
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    iou = [100 * h / u if u else None for h, u in zip(hits, union, strict=True)]
    return {
        "miou": np.mean([value for value in iou if value is not None]),
        "pixel_accuracy": 100 * hits.sum() / matrix.sum(),
        "per_class": dict(zip(NAMES, iou, strict=True)),
    }


def assert_same(got: dict[str, Any], want: dict[str, Any], tolerance: float = 1e-4) -> None:
    for key in ("miou", "pixel_accuracy"):
        assert got[key] == pytest.approx(want[key], abs=tolerance)
    assert got["per_class"].keys() == want["per_class"].keys()
    for name, value in want["per_class"].items():
        if value is None:
            assert got["per_class"][name] is None
        else:
            assert got["per_class"][name] == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("vocabulary", ["full", "present"])
def test_figures_equal_a_loop_over_pixels(tmp_path: Path, vocabulary: str) -> None:
    bench = benchmark(write_benchmark(tmp_path / "data", 3), vocabulary=vocabulary)
    results = evaluate(tmp_path / "run", bench, settings(pictures=2))
    assert_same(results, brute_force(bench, present_only=vocabulary == "present"))
    assert results["images"] == 3
    assert 5 < results["miou"] < 95
    pictures = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["0.png", "1.png"]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_figures_on_gpu(tmp_path: Path, gpu: torch.device, workers: int) -> None:
    """Pinned samples, confusion matrix on the device, pictures drawn from there."""
    bench = benchmark(write_benchmark(tmp_path / "data", 3))
    config = settings(pictures=2, batch_size=2, num_workers=workers)
    config.trainer.accelerator = "gpu" if gpu.type == "cuda" else "cpu"
    assert_same(evaluate(tmp_path / "run", bench, config), brute_force(bench), 0.05)
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 2


def test_present_vocabulary_without_background(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data", 2)
    for mask in (root / "masks").iterdir():
        values = np.asarray(Image.open(mask)).copy()
        values[values == 0] = 255
        values[values == 20] = 255
        Image.fromarray(values).save(mask)
    classes = [{"name": n, "id": 10 * i} for i, n in enumerate(NAMES) if i]
    (root / "classes.json").write_text(json.dumps({"classes": classes, "unlabeled": [99]}))
    bench = benchmark(root, vocabulary="present")
    results = evaluate(tmp_path / "run", bench)
    assert results["per_class"]["green"] is None  # never there, never offered
    matrix = np.zeros((3, 3), int)
    for index in range(2):
        sample = bench.sample(index)
        scores = scores_of(sample.image, bench)[[0, 2]]
        guess = scores.argmax(0) * 2
        keep = sample.target != 255
        np.add.at(matrix, (sample.target[keep].numpy(), guess[keep].numpy()), 1)
    assert results["pixel_accuracy"] == pytest.approx(100 * matrix.trace() / matrix.sum())


def test_a_picture_without_any_class_counts_nothing(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data", 2)
    Image.new("L", (56, 40), 255).save(root / "masks" / "1.png")
    results = evaluate(tmp_path / "run", benchmark(root, vocabulary="present"))
    assert results["images"] == 2
    alone = evaluate(tmp_path / "alone", benchmark(root, vocabulary="present", limit=1))
    assert alone["images"] == 1
    assert results["per_class"] == alone["per_class"]


def test_nothing_that_counts_is_no_figure(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data")
    for path in (root / "masks").iterdir():
        Image.new("L", (56, 40), 255).save(path)
    with pytest.raises(DataError, match=r"all pixels of its 5 images are ignored \(255\)"):
        evaluate(tmp_path / "run", benchmark(root))
    assert not (tmp_path / "run" / "results.json").exists()


def test_masks_of_0_and_255_are_not_taken_for_void(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data")
    for path in (root / "masks").iterdir():
        mask = np.zeros((40, 56), np.uint8)
        mask[:20] = 255
        Image.fromarray(mask).save(path)
    names = {"classes": ["background", "red"]}
    with pytest.raises(DataError, match=r"hold 0 and 255 only.*label_map=\{255:1\}"):
        benchmark(root, **names).check()
    benchmark(root, **names, label_map={255: 255}).check()
    second = benchmark(root, **names, label_map={255: 1})
    second.check()
    assert second.sample(0).target.unique().tolist() == [0, 1]


def rank_evaluates(rank: int, root: str, out: str) -> None:
    """Both benchmarks as one of two ranks; the second has one image for two ranks."""
    for name, limit in (("five", None), ("one", 1)):
        bench = benchmark(Path(root), limit=limit)
        results = evaluate(Path(out) / name, bench, settings(2, "ddp", pictures=5))
        assert bool(results) == (rank == 0)


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data")
    two_ranks(rank_evaluates, str(root), str(tmp_path))
    for name, limit, images in (("five", None, 5), ("one", 1, 1)):
        want = evaluate(tmp_path / f"{name} alone", benchmark(root, limit=limit))
        got = json.loads((tmp_path / name / "results.json").read_text())
        assert_same(got, want, tolerance=0)
        assert got["images"] == want["images"] == images
        assert len(list((tmp_path / name / "pictures").iterdir())) == images


def test_results_of_spawned_ranks_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_what_lightning_spawns(monkeypatch)
    bench = benchmark(write_benchmark(tmp_path / "data", 3))
    results = evaluate(tmp_path / "run", bench, settings(2, "ddp_spawn"))
    assert_same(results, evaluate(tmp_path / "alone", bench), tolerance=0)
    assert results["images"] == 3


def rank_of(rank: int, world: int) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("length", "batch_size"), [(1, 1), (5, 1), (5, 2), (5, 9)])
def test_ranks_share_the_images(tmp_path: Path, world: int, length: int, batch_size: int) -> None:
    bench = benchmark(write_benchmark(tmp_path, length))
    seen = []
    for rank in range(world):
        data = SegmentationDataModule(bench, num_workers=0, batch_size=batch_size)
        data.trainer = rank_of(rank, world)
        works = list(data.predict_dataloader())
        assert works  # an idle rank would hang the others
        seen += [index for work in works for index in work.indices]
    assert sorted(seen) == list(range(length))


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("background\n\n cat ; kitten\ndog\n")
    classes = read_classes(tmp_path / "names.txt")
    assert classes.names == ["background", "cat", "dog"]
    assert classes.has_background
    assert [spec.synonyms for spec in classes.prompted] == [("cat", "kitten"), ("dog",)]
    assert [spec.value for spec in classes.classes] == [0, 1, 2]
    (tmp_path / "a.json").write_text('["cat", {"name": "dog", "id": 7, "synonyms": ["hound"]}]')
    classes = read_classes(tmp_path / "a.json")
    assert [(s.name, s.value) for s in classes.classes] == [("cat", 0), ("dog", 7)]
    assert classes.classes[1].synonyms == ("hound",)
    assert not classes.has_background
    assert read_classes(["cat", "dog"]).names == ["cat", "dog"]
    (tmp_path / "gap.txt").write_bytes(b"\xef\xbb\xbfcat\t\r\n\r\ndog \r\n\r\n")
    with pytest.warns(ResultWarning, match=r"gap\.txt: line 2 is empty and does not count: label"):
        assert read_classes(tmp_path / "gap.txt").names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "the class list is empty"),
        ("a.txt", " \n\n", "the class list is empty"),
        ("a.txt", "cat\n;\n", "class 1 is ';'; give it a name"),
        ("a.txt", "background", "background is the only class"),
        ("a.txt", "0 cat\n7: dog\n", "line 1 is '0 cat', where the number would be part of"),
        ("a.json", "{oops", "not a json file"),
        ("a.json", "[]", "the class list is empty"),
        ("a.json", "3", "expected a list"),
        ("a.json", '[{"id": 3}]', "class 0 is .*; give it a name"),
        ("a.json", '[{"name": "cat", "id": "x"}]', "class 0 .*id"),
        ("a.json", '[{"name": "a", "id": 1}, {"name": "b", "id": 1}]', "label value 1"),
        ("a.json", '{"classes": ["a"], "unlabeled": "none"}', "unlabeled"),
        ("a.json", '{"classes": ["a", "b"], "unlabeled": 1}', "unlabeled 1 is the label value of"),
    ],
)
def test_class_list_errors_are_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_classes(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        read_classes(tmp_path / "other.txt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "data", 2)


def test_label_maps_of_all_kinds(root: Path) -> None:
    want = benchmark(root).sample(0).target
    assert set(want.unique().tolist()) <= {0, 1, 2, 3, 255}
    path = root / "masks" / "0.png"
    values = np.asarray(Image.open(path))
    for image in (
        Image.fromarray(values).convert("P"),  # a gray palette keeps the values
        Image.fromarray(values.astype(np.uint16)),
    ):
        image.save(path)
        assert torch.equal(benchmark(root).sample(0).target, want)
    mask = Image.new("1", (56, 40), 1)
    mask.save(path)
    assert (benchmark(root, classes=["a", "b"]).sample(0).target == 1).all()


def broken(root: Path, kind: str) -> None:
    path = root / "masks" / "1.png"
    if kind == "missing":
        path.unlink()
    elif kind == "size":
        Image.new("L", (40, 56)).save(path)
    elif kind == "value":
        Image.new("L", (56, 40), 7).save(path)
    elif kind == "wide value":
        Image.fromarray(np.full((40, 56), 4000, np.uint16)).save(path)
    elif kind == "colour":
        Image.new("RGB", (56, 40)).save(path)
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "image":
        (root / "images" / "1.png").write_text("no picture")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 images have no label map, the first is 1\.png; add 1\.png"),
        ("size", r"masks/1\.png: \(56, 40\) rows and columns, its image 1\.png has \(40, 56\)"),
        ("value", r"masks/1\.png: label value 7 is no class of benchmark\.classes"),
        ("wide value", r"masks/1\.png: label value 4000 is no class"),
        ("colour", r"masks/1\.png: a RGB picture, not a label map; save the class values"),
        ("text", r"masks/1\.png: cannot be read"),
        ("truncated", r"masks/1\.png: cannot be read"),
        ("image", r"images/1\.png: cannot be read as an image"),
    ],
)
def test_broken_benchmarks_are_one_line(root: Path, kind: str, message: str) -> None:
    broken(root, kind)
    with pytest.raises(DataError, match=message) as error:
        benchmark(root).sample(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, r"benchmark\.images=.*nowhere: no such folder"),
        ({"masks": "nowhere"}, r"benchmark\.masks=.*nowhere: no such folder"),
        ({"classes": "nowhere.txt"}, r"benchmark\.classes=.*nowhere\.txt: no such file"),
        ({"ignore_index": 20}, "benchmark.ignore_index=20 is also a class"),
        ({"limit": 0}, "benchmark.limit=0: use 1 or more"),
        ({"vocabulary": "some"}, "benchmark.vocabulary='some'; choose one of full, present"),
    ],
)
def test_wrong_benchmark_settings_are_one_line(
    root: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(root, **options)


def test_images_of_all_kinds(tmp_path: Path) -> None:
    ramp = (np.arange(48).reshape(6, 8) * 5).astype(np.uint8)
    gray = torch.from_numpy(ramp).expand(3, -1, -1)
    Image.fromarray(ramp).save(tmp_path / "gray.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # turn anticlockwise
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "gray.png"), gray)
    assert torch.equal(read_image(tmp_path / "wide.png"), gray)
    assert torch.equal(read_image(tmp_path / "turned.png"), gray.rot90(1, (1, 2)))
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    pixels = read_image(tmp_path / "cmyk.jpg")
    assert pixels[0].min() > 240
    assert pixels[1:].max() < 15


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_miou_so_far(root: Path, tmp_path: Path, terminal: bool) -> None:
    from talk2dino.evaluation.module import EvaluationProgress, SegmentationModule
    from talk2dino.segmentation import Segmenter

    bench = benchmark(root)
    text = torch.nn.functional.normalize(COLORS, dim=-1)
    segmenter = Segmenter(MeanColorEncoder(), background_threshold=0.6, **SMALL)
    for known in (0, 2):
        module = SegmentationModule(segmenter, bench, text, torch.arange(3), tmp_path)
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[EvaluationProgress(console)]
        )
        data = SegmentationDataModule(bench, num_workers=0, finished=module.finished)
        trainer.predict(module, data, return_predictions=False)
        shown = console.file.getvalue()
        assert ("2 of 2 images were finished before" in shown) == (known == 2)
        if terminal:
            assert "2/2" in shown
        if terminal and not known:
            assert f"mIoU {module.results['miou']:.1f}" in shown


def test_only_the_encoder_runs_in_lower_precision(root: Path, tmp_path: Path) -> None:
    """The stand-in encoder has nothing to round, so a difference would come from the scores."""
    exact = evaluate(tmp_path / "exact", benchmark(root))
    config = settings()
    config.trainer.precision = "bf16-mixed"
    assert_same(evaluate(tmp_path / "mixed", benchmark(root), config), exact, tolerance=0)
    for good in ("32-true", "64-true", "16-mixed", "bf16-mixed", "32"):
        check_encoder_precision(good)
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true: .*; use bf16-mixed"):
        check_encoder_precision("bf16-true")


# --- through the entry point, with the encoders that come with packages ---------------------------


def test_prompts_are_embedded_once(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talk2dino.encoders.text.sentence import SentenceTransformerTextEncoder

    run(*evaluate_mosaic(trained_run, tmp_path / "first"))
    monkeypatch.setattr(SentenceTransformerTextEncoder, "encode", None)  # calling it would fail
    run(*evaluate_mosaic(trained_run, tmp_path / "second"))
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second")
    )
    assert first["per_class"] == second["per_class"]


def test_the_mosaic_benchmark_end_to_end(trained_run: Path, tmp_path: Path) -> None:
    run(*evaluate_mosaic(trained_run, tmp_path, "compare_untrained=true", "pictures=1"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {
        "benchmark",
        "miou",
        "pixel_accuracy",
        "per_class",
        "images",
        "seconds",
        "config",
    }
    assert (results["benchmark"], results["images"]) == ("mosaic", 3)
    assert results["config"]["benchmark"]["count"] == 3
    untrained = json.loads((tmp_path / "results_untrained.json").read_text())
    assert results["pixel_accuracy"] > untrained["pixel_accuracy"]
    assert len(list((tmp_path / "pictures").iterdir())) == 1

    from talk2dino import Talk2DINO
    from talk2dino.alignment.class_names import embed_class_names
    from talk2dino.segmentation import Segmenter

    model = Talk2DINO.from_pretrained(trained_run, device="cpu")
    size: dict[str, Any] = {"short_side": 112, "window": 112, "stride": 56, "input_size": 112}
    bench = MosaicBenchmark(name="mosaic", count=3, height=112, width=112, **size)
    names = bench.class_list.names
    text, _ = embed_class_names([[name] for name in names], model.text, model.projection)
    counts = {name: [0, 0] for name in names}
    right = total = 0
    for index in range(3):
        sample = bench.sample(index)
        labels = Segmenter(model.vision, **size)(sample.image, text).labels
        right += int((labels == sample.target).sum())
        total += sample.target.numel()
        for k, name in enumerate(names):
            counts[name][0] += int(((labels == k) & (sample.target == k)).sum())
            counts[name][1] += int(((labels == k) | (sample.target == k)).sum())
    iou = {name: 100 * a / b if b else None for name, (a, b) in counts.items()}
    defined = [value for value in iou.values() if value is not None]
    assert_same(
        results,
        {"miou": np.mean(defined), "pixel_accuracy": 100 * right / total, "per_class": iou},
        tolerance=0.05,  # window batches may round a pixel the other way
    )


def test_errors_inside_loader_workers_are_one_line(
    trained_run: Path, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken(root, "value")
    custom = [
        "benchmark=custom",
        f"benchmark.root={root}",
        "benchmark.images=images",
        "benchmark.masks=masks",
        "benchmark.classes=classes.json",
        "num_workers=1",
    ]
    command = [
        item
        for item in evaluate_mosaic(trained_run, tmp_path)
        if item not in ("benchmark=mosaic", "num_workers=0")
        and not item.startswith(("benchmark.count", "benchmark.height", "benchmark.width"))
    ]
    line = fails(capfd, *command, *custom)
    assert line.startswith(f"{root}/masks/1.png: label value 7 is no class"), line


def test_a_checkpoint_of_another_shape_is_one_line(
    mosaic_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need("skimage")
    file = tmp_path / "other.safetensors"
    save_projection(ProjectionLayer(512, 768), file)
    line = fails(capfd, *evaluate_mosaic(file, tmp_path / "a"))
    assert "does not name its vision encoder; say it with vision=…" in line
    encoders = ("vision=dinov2_vits14", "text=minilm")
    line = fails(capfd, *evaluate_mosaic(file, tmp_path / "b", *encoders))
    assert "was trained for a vision encoder of width 768, but" in line
    line = fails(capfd, *evaluate_mosaic(tmp_path / "none.ckpt", tmp_path / "c"))
    assert "none.ckpt: no such file" in line


def test_a_module_can_predict_twice(root: Path, tmp_path: Path) -> None:
    from talk2dino.evaluation.module import SegmentationModule
    from talk2dino.segmentation import Segmenter

    bench = benchmark(root)
    text = torch.nn.functional.normalize(COLORS, dim=-1)
    segmenter = Segmenter(MeanColorEncoder(), background_threshold=0.6, **SMALL)
    module = SegmentationModule(segmenter, bench, text, torch.arange(3), tmp_path)
    found = []
    for _ in range(2):
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        data = SegmentationDataModule(bench, num_workers=0)
        trainer.predict(module, data, return_predictions=False)
        found.append({k: v for k, v in module.results.items() if k != "seconds"})
    assert found[0] == found[1]
