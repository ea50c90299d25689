"""Names that classes had in earlier versions: in configs, checkpoints, stores and records."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from talk2dino.alignment import ProjectionLayer
from talk2dino.alignment.checkpoint import load_projection, save_projection
from talk2dino.config.checks import check_targets, use_current_names
from talk2dino.encoders.build import check_spec
from talk2dino.errors import ConfigError
from talk2dino.evaluation.records import Records
from talk2dino.features.store.writer import open_for_append
from talk2dino.renamed import RENAMED, current, with_current_names
from tests.helpers.configs import compose, needed
from tests.helpers.pipeline import fails

# Every `_target_` of the configs of version 0.1, by command, group and option.
HEADS = ("MaxRowSum", "MaxScore", "MeanHeads", "Nucleus", "SampledHead", "SoftHead", "SumHeads")
VERSION_0_1 = [
    ("extract", "source", "coco_captions", "talk2dino.features.sources.CocoCaptions"),
    ("extract", "source", "folder", "talk2dino.features.sources.CaptionFolder"),
    ("extract", "source", "mosaic", "talk2dino.features.sources.Mosaic"),
    ("extract", "source", "webdataset", "talk2dino.features.sources.WebDataset"),
    ("extract", "vision", "timm", "talk2dino.encoders.vision.TimmVisionEncoder"),
    ("extract", "text", "clip_vitb16", "talk2dino.encoders.text.OpenClipTextEncoder"),
    ("extract", "text", "minilm", "talk2dino.encoders.text.SentenceTransformerTextEncoder"),
    ("train", "projection", "mlp", "talk2dino.alignment.projection.ProjectionLayer"),
    ("train", "projection", "double_mlp", "talk2dino.alignment.projection.DoubleMLP"),
    (
        "train",
        "projection",
        "visual",
        "talk2dino.alignment.visual_projection.VisualProjectionLayer",
    ),
    (
        "train",
        "projection",
        "clip_last_layer",
        "talk2dino.alignment.clip_last_layer.CLIPLastLayer.from_text_encoder",
    ),
    *(
        ("train", "similarity", option, f"talk2dino.alignment.similarity.{name}")
        for option, name in zip(
            (
                *("max_row_sum", "max_score", "mean", "nucleus", "sampled_head", "soft_head"),
                *("sum", "weighted_avg", "dense", "pooled"),
            ),
            (*HEADS, "WeightedAverage", "Dense", "DotProduct"),
            strict=True,
        )
    ),
    ("train", "loss", "infonce", "talk2dino.alignment.losses.InfoNCE"),
    ("train", "loss", "triplet", "talk2dino.alignment.losses.TripletLoss"),
    ("train", "optimizer", "adam", "torch.optim.Adam"),
    ("train", "optimizer", "adamw", "torch.optim.AdamW"),
    ("train", "scheduler", "constant", "talk2dino.alignment.schedules.constant_with_warmup"),
    ("train", "scheduler", "cosine", "talk2dino.alignment.schedules.cosine_with_warmup"),
    ("train", "trainer", "auto", "lightning.Trainer"),
    ("train", "logger", "csv", "lightning.pytorch.loggers.CSVLogger"),
    ("train", "logger", "tensorboard", "lightning.pytorch.loggers.TensorBoardLogger"),
    ("train", "logger", "wandb", "lightning.pytorch.loggers.WandbLogger"),
    ("evaluate", "refinement", "knn", "talk2dino.segmentation.knn.KNN"),
    ("evaluate", "benchmark", "custom", "talk2dino.segmentation.folder.FolderBenchmark"),
    ("evaluate", "benchmark", "mosaic", "talk2dino.segmentation.mosaic.MosaicBenchmark"),
    ("evaluate", "benchmark", "stuff", "talk2dino.segmentation.coco_stuff.CocoStuffBenchmark"),
    (
        "evaluate",
        "benchmark",
        "coco_object",
        "talk2dino.segmentation.coco_stuff.CocoObjectBenchmark",
    ),
    (
        "evaluate",
        "benchmark",
        "cityscapes",
        "talk2dino.segmentation.cityscapes.CityscapesBenchmark",
    ),
]
OF_HYDRA = (
    "talk2dino.cli.ExitStatus",
    "talk2dino.sweeps.callback.SweepTable",
    "talk2dino.sweeps.evaluation_report.SweepReport",
)
OLD_FOLDER = "talk2dino.segmentation.folder.FolderBenchmark"


@pytest.fixture(autouse=True)
def _clean_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("old", [*RENAMED, *OF_HYDRA, *(target for *_, target in VERSION_0_1)])
def test_every_old_name_is_a_class_of_that_name(old: str) -> None:
    name = old.rpartition(".")[2]
    wanted = {"caption_word_loss": "WordOptions"}.get(name, name)  # once a function of all options
    assert get_object(current(old)).__name__ == wanted


@pytest.mark.parametrize("old", RENAMED)
def test_no_name_is_both_old_and_present(old: str) -> None:
    """A name that can still be imported needs no alias, and an alias leads to no other."""
    package, _, module = old.rpartition(".")[0].rpartition(".")
    present = importlib.util.find_spec(package) is not None and importlib.util.find_spec(
        f"{package}.{module}"
    )
    assert not present
    assert current(RENAMED[old]) == RENAMED[old]


@pytest.mark.parametrize(("command", "group", "option", "target"), VERSION_0_1)
def test_configs_of_version_0_1_compose(command: str, group: str, option: str, target: str) -> None:
    config = compose(command, f"{group}={option}", *needed(command, group, option))
    present = config[group]["_target_"]
    config[group]["_target_"] = target
    use_current_names(config)
    check_targets(config)
    assert get_object(config[group]["_target_"]) == get_object(present)


def test_a_config_of_ones_own_may_use_old_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It comes as far as the missing store; a callback, which Hydra builds itself, is named."""
    (tmp_path / "similarity").mkdir()
    old = "_target_: talk2dino.alignment.paired_heads.MaxScore\n"
    (tmp_path / "similarity" / "mine.yaml").write_text(old)
    given = ("train", "--config-dir", tmp_path, f"store={tmp_path}", f"hydra.run.dir={tmp_path}")
    assert "manifest.json" in fails(capfd, *given, "similarity=mine")
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {status: {_target_: talk2dino.cli.ExitStatus}}}\n"
    )
    line = fails(capfd, *given, "launcher=mine")
    assert line.endswith(
        "talk2dino.cli.ExitStatus: is called talk2dino.config.command.ExitStatus now"
    )


def test_nested_and_dotted_names() -> None:
    given = {
        "benchmark": {"_target_": OLD_FOLDER, "classes": ["_target_"]},
        "benchmark._target_": OLD_FOLDER,
        "parts": [{"_target_": "torch.nn.ReLU", "name": OLD_FOLDER}],
        "_target_": None,
    }
    new = current(OLD_FOLDER)
    assert with_current_names(given) == given | {
        "benchmark": {"_target_": new, "classes": ["_target_"]},
        "benchmark._target_": new,
    }
    assert OmegaConf.to_container(OmegaConf.create(given)) == given


def test_checkpoints_and_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_spec({"_target_": "talk2dino.encoders.open_clip_text.OpenClipTextEncoder"}, "text")
    path = tmp_path / "old.safetensors"
    save_projection(ProjectionLayer(4, 6), path)
    old = {"_target_": "talk2dino.former.ProjectionLayer", "text_dim": 4, "vision_dim": 6}
    metadata = {"talk2dino": json.dumps({"projection": old})}
    save_file(load_file(path), path, metadata=metadata)
    monkeypatch.setattr(
        "talk2dino.renamed.RENAMED",
        {old["_target_"]: "talk2dino.alignment.projection.ProjectionLayer"},
    )
    assert isinstance(load_projection(path), ProjectionLayer)


def test_what_was_begun_goes_on(tmp_path: Path) -> None:
    """Stores and evaluations compare their settings by present names."""
    before = {"benchmark._target_": OLD_FOLDER, "source": {"_target_": OLD_FOLDER}}
    now = {"benchmark._target_": current(OLD_FOLDER), "source": {"_target_": current(OLD_FOLDER)}}
    Records(tmp_path / "records").claim(before)
    Records(tmp_path / "records").claim(now)
    with pytest.raises(ConfigError, match="began with"):
        Records(tmp_path / "records").claim(now | {"benchmark._target_": "another.Benchmark"})
    open_for_append(tmp_path / "store", before, "train")
    open_for_append(tmp_path / "store", now, "train")
