"""Make this folder's stores, checkpoints, evaluations and expectations, with version 0.1.

    python -m tests.data.written_by_0_1.make [FOLDER]

was run once, at version 0.1, in the repository; FOLDER (/tmp/written_by_0_1) is made anew, and its
content was moved here. It is not meant to be run with later versions: what they write is another
matter, and `tests/project/test_compatibility.py` holds them to what lies here. The script stays to
say how everything came about. All pictures and weights are seeded; times, random file names of
records and the bytes of compressed pictures are all that differ from run to run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from talk2dino.alignment.visual_projection import VisualProjectionLayer

from talk2dino import Talk2DINO, load_projection
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import DoubleMLP, ProjectionLayer
from talk2dino.features import FeatureDataModule, FeatureStore, write_store
from tests.data.written_by_0_1.parts import (
    CLIP,
    HERE,
    VISION,
    batches,
    picture,
    segmented,
    write_bert,
    write_encoders,
)
from tests.helpers.pipeline import TRAIN, run

COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
IMAGES = 16
IMAGE_FIELDS = (
    "patch_tokens",
    "self_attn_maps",
    "cls_token",
    "avg_self_attn_out",
    "disentangled_self_attn",
    "second_last_out",
)
CAPTION_FIELDS = (
    "embedding",
    "token_embeddings",
    "token_mask",
    "second_last_tokens",
    "eot_index",
)


def make_pictures() -> None:
    """`pictures/`: 16 gray pictures with a square of one color, two captions each."""
    Path("pictures").mkdir()
    random = np.random.RandomState(0)
    lines = []
    for number in range(IMAGES):
        name = list(COLORS)[number % 3]
        pixels = np.full((64, 64, 3), random.randint(80, 120), np.uint8)
        top, left, side = *(16 * random.randint(0, 3, 2)), 16 * random.randint(1, 3)
        pixels[top : top + side, left : left + side] = COLORS[name]
        Image.fromarray(pixels).save(f"pictures/{number:02d}.png")
        size = "large" if side > 16 else "small"
        for text in (f"a {size} {name} square", f"the picture of a {name} square on gray"):
            lines.append({"file_name": f"{number:02d}.png", "caption": text})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path("pictures/captions.jsonl").write_text(text)


def make_benchmark() -> None:
    """`squares/`: four pictures of colored blocks with label maps; 99 is unlabeled."""
    for name in ("images", "masks"):
        Path("squares", name).mkdir(parents=True)
    random = np.random.RandomState(1)
    palette = np.array([(100, 100, 100), *COLORS.values(), (10, 10, 10)], np.uint8)
    values = np.array([0, 10, 20, 30, 99], np.uint8)
    for number in range(4):
        blocks = random.randint(0, 5, (3, 4)).repeat(16, 0).repeat(16, 1)
        Image.fromarray(palette[blocks]).save(f"squares/images/{number}.png")
        Image.fromarray(values[blocks]).save(f"squares/masks/{number}.png")
    classes = [{"name": name, "id": 10 * k} for k, name in enumerate(["background", *COLORS])]
    Path("squares/classes.json").write_text(json.dumps({"classes": classes, "unlabeled": 99}))


def extract(store: str, *overrides: str) -> None:
    """All fields of `pictures/`, eight images a shard."""
    run(
        "extract",
        "source=folder",
        "source.images=pictures",
        "vision=timm",
        f"vision.name={VISION}",
        "vision.weights=encoders/vision.safetensors",
        "vision.image_size=64",
        "vision.batch_size=4",
        "text=clip_vitb16",
        f"text.name={CLIP}",
        "text.weights=encoders/clip.safetensors",
        "text.templates=plain",
        f"features.image_fields=[{','.join(IMAGE_FIELDS)}]",
        f"features.caption_fields=[{','.join(CAPTION_FIELDS)}]",
        "images_per_shard=8",
        "num_workers=0",
        "accelerator=cpu",
        f"store={store}",
        *overrides,
        f"hydra.run.dir=extracted/{Path(store).name}",
    )


def make_stores() -> None:
    """`stores/`: by extraction, stopped, from arrays, as an archive, from the original's files."""
    extract("stores/extracted")
    extract("stores/stopped")
    for name in ("manifest.json", "train-00001.h5", ".parts/train-00001.json"):
        Path("stores/stopped", name).unlink()  # as a kill during the second shard leaves it

    random = np.random.RandomState(2)
    images = {
        "id": 100 + np.arange(6),
        "file_name": np.array([f"bild-ä{n}.jpg" for n in range(6)]),
        "patch_tokens": random.choice([-1.0, 0.25, 0.5], (6, 3, 8)).astype(np.float32),
        "patch_index": np.tile([0, 2, 3], (6, 1)),
        "avg_self_attn_out": random.standard_normal((6, 8)).astype(np.float32),
        "disentangled_self_attn": random.standard_normal((6, 2, 8)).astype(np.float32),
    }
    captions = {
        "image_row": np.array([0, 1, 1, 2, 3, 4, 5, 5]),
        "text": np.array(["a", "eine Straße", "", "b", "c", "d", "e", "f"]),
        "embedding": random.standard_normal((8, 5)).astype(np.float32),
    }
    write_store(
        "stores/arrays",
        images,
        captions,
        split="val",
        images_per_shard=4,
        dtype="float32",
        vision={"name": "a vision encoder", "embed_dim": 8},
        text={"name": "a text encoder", "embed_dim": 5},
    )
    run("convert", "archive", "store=stores/arrays", "output=stores/archive")

    tensors = {
        "images": [
            {
                "id": 7 + n,
                "file_name": f"COCO_{n}.jpg",
                "avg_self_attn_out": torch.from_numpy(images["avg_self_attn_out"][n]),
                "disentangled_self_attn": torch.from_numpy(images["disentangled_self_attn"][n]),
            }
            for n in range(6)
        ],
        "annotations": [
            {
                "id": 40 + k,
                "image_id": 7 + int(row),
                "caption": f"caption {k}",
                "ann_feats": torch.from_numpy(captions["embedding"][k]).half(),
            }
            for k, row in enumerate(captions["image_row"])
        ],
    }
    del tensors["images"][4]["avg_self_attn_out"]  # is skipped and listed
    torch.save(tensors, "original.pth")
    run(
        "convert",
        "features",
        "input=original.pth",
        "store=stores/original",
        "vision=dinov2_vits14",
        "text=clip_vitb16",
        "images_per_shard=4",
    )
    Path("original.pth").unlink()


def train(folder: str, *overrides: str, multirun: bool = False) -> None:
    """Two short epochs on the extracted store; 12 images are trained on, 4 held out."""
    run(
        "train",
        *(["-m"] if multirun else []),
        "store=stores/extracted",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "optimizer.lr=1e-2",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        *TRAIN,
        *overrides,
        f"hydra.{'sweep' if multirun else 'run'}.dir={folder}",
    )


FAITHFUL = ("experiment=vitb_infonce", "projection.text_dim=16", "projection.vision_dim=64")
SHARP = ("loss.normalize_by_batch_squared=false",)
DENSE = ("experiment=vits_dense", "projection.text_dim=16", "projection.vision_dim=64")
RUNS: dict[str, tuple[str, ...]] = {
    "max_score": (*FAITHFUL, *SHARP, "record_heads=true", "trainer.max_epochs=4"),
    "dense_ema": (
        *DENSE,
        "ema.decay=0.9",
        "checkpoint.monitor=train/loss",
        "checkpoint.mode=min",
        "early_stopping.patience=5",
        "projection=linear",
        "trainer.max_epochs=20",
        "trainer.check_val_every_n_epoch=10",
    ),
    "static_heads": (*FAITHFUL, *SHARP, "projection=static_heads", "similarity=pooled"),
    "clip_last_layer": (*FAITHFUL, *SHARP, "projection=clip_last_layer"),
}

MORE_EPOCHS = {"max_score": 6, "dense_ema": 30, "static_heads": 4, "clip_last_layer": 4}


def make_runs() -> None:
    """`runs/`: training runs; `expected/resumed.npz`: their weights after more epochs."""
    for name, overrides in RUNS.items():
        train(f"runs/{name}", *overrides)
    resumed: dict[str, Any] = {}
    validation = {}
    for name, overrides in RUNS.items():
        folder = Path("resumed", name)
        shutil.copytree(Path("runs", name), folder)
        epochs = MORE_EPOCHS[name]
        train(str(folder), *overrides, "resume=true", f"trainer.max_epochs={epochs}")
        projection = load_projection(folder / "projection.safetensors")
        for key, value in projection.state_dict().items():
            resumed[f"{name}/{key}"] = value.numpy()
        metrics = json.loads((folder / "metrics.json").read_text())
        keys = ("steps", "train/loss", "validation")
        validation[name] = {key: metrics[key] for key in keys} | {"epochs": epochs}
    np.savez_compressed("expected/resumed.npz", **resumed)
    Path("expected/resumed.json").write_text(json.dumps(validation, indent=1))
    shutil.rmtree("resumed")


INPUTS = {
    "linear": (16,),
    "mlp": (16,),
    "deep": (4,),
    "double_mlp": (4,),
    "static_heads": (4,),
    "conditioned_heads": (4,),
    "visual": (384,),
    "visual_one_layer": (6,),
    "clip_last_layer": (5, 8),
}


def make_projections() -> None:
    """`projections/`: a file per class and head weighting; `expected/projections.npz`."""
    Path("projections").mkdir()
    made = {
        "linear": lambda: ProjectionLayer(16, 64, 0),
        "mlp": lambda: ProjectionLayer(16, 64, 1, "relu"),
        "deep": lambda: ProjectionLayer(4, 6, 2, None),
        "double_mlp": lambda: DoubleMLP(4, 6),
        "static_heads": lambda: ProjectionLayer(4, 6, 1, "tanh", "static", 2),
        "conditioned_heads": lambda: ProjectionLayer(4, 6, 1, "tanh", "conditioned", 2),
        "visual": lambda: VisualProjectionLayer(384, 384, 4),
        "visual_one_layer": lambda: VisualProjectionLayer(4, 6),
        "clip_last_layer": lambda: CLIPLastLayer(4, 6, 8, 2, quick_gelu=True),
    }
    tiny = {
        "_target_": "talk2dino.encoders.vision.TimmVisionEncoder",
        "name": VISION,
        "weights": "encoders/vision.safetensors",
        "image_size": 64,
        "batch_size": 16,
        "rope_in_attention": True,
    }
    bert = {
        "_target_": "talk2dino.encoders.text.BertTextEncoder",
        "name": "tiny-bert",
        "weights": "encoders/bert",
        "batch_size": 4,
        "templates": "plain",
        "pooling": "pooler",
        "max_length": 16,
    }
    bundled = {
        "_target_": "talk2dino.encoders.vision.TimmVisionEncoder",
        "name": "vit_small_patch14_dinov2",
        "weights": "bundled",
        "image_size": 112,
        "batch_size": 16,
        "rope_in_attention": True,
    }
    minilm = {
        "_target_": "talk2dino.encoders.text.SentenceTransformerTextEncoder",
        "name": "sentence-transformers/all-MiniLM-L6-v2",
        "weights": "bundled",
        "batch_size": 256,
        "templates": "plain",
        "max_length": None,
    }
    encoders = {
        "mlp": {"vision": tiny, "text": bert},
        "visual": {"vision": bundled, "text": minilm},
    }
    expected: dict[str, Any] = {}
    for seed, (name, build) in enumerate(made.items()):
        torch.manual_seed(seed)
        file = Path("projections", f"{name}.safetensors")
        save_projection(build(), file, encoders.get(name))
        random = np.random.RandomState(seed)
        given = [random.standard_normal((3, *INPUTS[name])).astype(np.float32)]
        if name == "clip_last_layer":
            given.append(np.array([4, 2, 0]))  # where the end token stands
        with torch.no_grad():
            out = load_projection(file)(*map(torch.from_numpy, given))
        expected |= {f"{name}/{place}": array for place, array in enumerate(given)}
        expected[f"{name}/out"] = out.numpy()
    run("convert", "weights", "input=projections/static_heads.safetensors", "output=heads.pth")
    Path("heads.pth").rename("projections/static_heads.pth")
    np.savez_compressed("expected/projections.npz", **expected)


def make_models() -> None:
    """`saved/`: by `save_pretrained`; `expected/models.npz`: what three models compute."""
    expected: dict[str, Any] = {}
    results = {"benchmark": "squares", "miou": 12.5, "pixel_accuracy": 50.0, "images": 4}
    trained = Talk2DINO.from_pretrained("runs/dense_ema", "cpu")
    trained.save_pretrained("saved", results=[results])
    for name in ("saved", "projections/mlp.safetensors", "projections/visual.safetensors"):
        model = Talk2DINO.from_pretrained(name, "cpu")
        stem = Path(name).stem
        expected |= {f"{stem}/{key}": value for key, value in segmented(model).items()}
    np.savez_compressed("expected/models.npz", **expected)


SQUARES = (
    "checkpoint=runs/dense_ema",
    "benchmark=custom",
    "benchmark.name=squares",
    "benchmark.root=squares",
    "benchmark.images=images",
    "benchmark.masks=masks",
    "benchmark.classes=classes.json",
    *[f"benchmark.{key}=64" for key in ("short_side", "window", "input_size")],
    "benchmark.stride=32",
    "benchmark.background_threshold=0.45",
    "+benchmark.reference.somebody.plain=10.0",
    "+benchmark.reference.somebody.pamr=20.0",
)
MOSAIC = (
    "checkpoint=runs/max_score",
    "benchmark=mosaic",
    "benchmark.count=3",
    *[f"benchmark.{key}=64" for key in ("height", "width", "short_side", "window", "input_size")],
    "benchmark.stride=64",
    "pictures=0",
    "examples=0",  # no photograph lies here, only counts of pixels
)


KINDS = ("pictures", "label_maps", "overlays")


def evaluate(folder: str, *overrides: str, multirun: bool = False) -> dict[str, Any]:
    """One evaluation (or a sweep of them); its results."""
    run(
        "evaluate",
        *(["-m"] if multirun else []),
        *overrides,
        "batch_size=1",
        "num_workers=0",
        *TRAIN,
        f"hydra.{'sweep' if multirun else 'run'}.dir={folder}",
    )
    file = Path(folder, "results.json")
    return {} if multirun else json.loads(file.read_text())


def stop_half_way(folder: Path, images: int) -> None:
    """Leave what a kill within image `images` leaves: records, half a line, and its pictures."""
    (part,) = (folder / "records").glob("part-*.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:images]) + lines[images][: len(lines[images]) // 2])
    for path in folder.iterdir():
        if path.name not in (*KINDS, "records", ".hydra", "evaluate.log"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for kind in KINDS:
        for path in (folder / kind).glob("*"):
            if int(path.name[0]) >= images:
                path.unlink()


def make_evaluations() -> None:
    """`evaluations/`: one finished, three stopped half way; `expected/evaluations.json`."""
    kept = ("pictures=3", "label_maps=true", "examples=1")
    refined = ("pamr=true", "refinement=knn", "benchmark.background_cleaning=true", "pictures=0")
    evaluate("evaluations/finished", *SQUARES, "compare_untrained=true", "pictures=1", "examples=1")
    expected = {
        "stopped": evaluate("evaluations/stopped", *SQUARES, *kept),
        "stopped_refined": evaluate("evaluations/stopped_refined", *SQUARES, *refined),
        "stopped_mosaic": evaluate("evaluations/stopped_mosaic", *MOSAIC),
    }
    Path("expected/evaluations.json").write_text(json.dumps(expected, indent=1))
    for name in expected:
        stop_half_way(Path("evaluations", name), 1 if "mosaic" in name else 2)


def make_sweeps() -> None:
    """`sweeps/`: of evaluations (one fails), of trainings, and a search."""
    with contextlib.suppress(SystemExit):  # one of four jobs fails
        evaluate(
            "sweeps/evaluations",
            *SQUARES[1:],
            "checkpoint=runs/dense_ema,runs/missing",
            "pamr=false,true",
            "pictures=0",
            "examples=0",
            multirun=True,
        )
    small = (*FAITHFUL, *SHARP, "projection=linear")
    train("sweeps/trainings", *small, "optimizer.lr=1e-3,1e-2", multirun=True)
    train("sweeps/search", *small, "sweep=optuna", "sweep.n_trials=2", multirun=True)


def make_segmented() -> None:
    """`segmented/`: two of three pictures are done; `expected/segmented/`: all of them."""
    Path("photos").mkdir()
    for number in range(3):
        picture(number, (48, 64)).save(f"photos/{number}.png")
    run(
        "segment",
        "checkpoint=runs/dense_ema",
        "image=photos",
        "classes=[red,green,[blue,azure]]",
        "background=0.45",
        "short_side=64",
        "accelerator=cpu",
        "output=segmented",
        "hydra.run.dir=.",
    )
    Path("expected/segmented").mkdir()
    for number in range(3):
        for end in (".json", "_labels.png"):
            shutil.copy(f"segmented/{number}{end}", "expected/segmented")
    Path("segmented/2.json").unlink()


def make_expectations() -> None:
    """`expected/`: rows and batches of the stores, and the tables of `compare`."""
    rows: dict[str, Any] = {}
    for folder in sorted(Path("stores").iterdir()):
        if folder.name == "stopped":
            continue
        store = FeatureStore(folder)
        for table in ("images", "captions"):
            fields = getattr(store, table)
            for name in fields.fields:
                values = np.asarray(fields[name][:])
                rows[f"{folder.name}/{table}/{name}"] = (
                    values.astype(str) if values.dtype.kind in "OS" else values
                )
    np.savez_compressed("expected/stores.npz", **rows)
    data = FeatureDataModule(
        "stores/extracted", ["patch_tokens"], batch_size=8, val_fraction=0.25, seed=3
    )
    np.savez_compressed("expected/batches.npz", **batches(data))
    for name, folders in {
        "one": ["evaluations/finished"],
        "all": ["sweeps/evaluations", "evaluations/finished", "evaluations/stopped_mosaic"],
    }.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run("compare", *folders, "--output", f"compared/{name}")
        Path("expected", f"compare_{name}.txt").write_text(said.getvalue())
        for ending in ("md", "csv"):
            shutil.copy(f"compared/{name}/summary.{ending}", f"expected/compare_{name}.{ending}")
    shutil.rmtree("compared")


def tidy() -> None:
    """Drop what nothing reads, and the weights of the encoders; name no folder or kernel."""
    for pattern in ("*.html", "loss.png", "heads.png", "sweep.png"):
        for path in Path().rglob(pattern):
            path.unlink()
    for path in [*Path("sweeps").rglob("hydra.yaml"), *Path("sweeps").rglob("multirun.yaml")]:
        path.unlink()
    for number in range(2):
        shutil.rmtree(f"sweeps/search/{number}/checkpoints")
    shutil.rmtree("extracted/extracted")
    Path("segment.log").unlink()
    for path in Path("encoders").rglob("*.safetensors"):
        path.unlink()
    shutil.rmtree("cache")
    root = str(HERE.parents[2])
    for path in Path().rglob("*"):
        if path.suffix in (".yaml", ".json", ".log", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            text = text.replace(root, "/repository").replace(platform.platform(), "Linux")
            path.write_text(text, encoding="utf-8")


def main() -> None:
    """Make everything in a folder of its own."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/written_by_0_1")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "encoders", folder / "encoders")
    os.chdir(folder)
    os.environ |= {"TALK2DINO_CACHE": "cache", "COLUMNS": "100"}
    torch.set_num_threads(1)
    Path("expected").mkdir()
    write_encoders(folder)
    write_bert(folder)
    steps: list[Callable[[], None]] = [
        make_pictures,
        make_benchmark,
        make_stores,
        make_runs,
        make_projections,
        make_models,
        make_evaluations,
        make_sweeps,
        make_segmented,
        make_expectations,
        tidy,
    ]
    for step in steps:
        print(f"--- {step.__name__}", flush=True)
        step()


if __name__ == "__main__":
    main()
