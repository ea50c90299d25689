"""Every config composes and runs; every wrong key, value or option is one line with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from torch import nn

from talk2dino import load_projection
from talk2dino.alignment import ProjectionLayer
from talk2dino.config import command
from talk2dino.config.checks import check_given, check_targets
from talk2dino.config.command import user_message
from talk2dino.config.schemas import SCHEMAS
from talk2dino.errors import DataError
from talk2dino.evaluate import build_segmenter, name_refinement
from tests.helpers.configs import CONF, GIVEN, compose, needed
from tests.helpers.pipeline import TRAIN, fails, run
from tests.helpers.stores import tiny_store

COMMANDS = ("extract", "train", "evaluate", "segment", "map", "calibrate", "embed", "search")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
USED = {  # groups of each command
    "extract": ("source", "vision", "layers", "text", "features", "launcher"),
    "train": (
        "projection",
        "similarity",
        "val_similarity",
        "loss",
        "words",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        "experiment",
        "sweep",
        "launcher",
    ),
    "evaluate": ("benchmark", "refinement", "trainer", "vision", "text", "launcher"),
    "segment": ("refinement", "vision", "text", "launcher"),
    "map": ("refinement", "vision", "text", "launcher"),
    "calibrate": ("rule", "vision", "text", "launcher"),
    "embed": ("vision", "text", "launcher"),
    "search": ("val_similarity", "vision", "text", "launcher"),
}
OPTIONS = [
    (command, group, path.stem)
    for command, groups in USED.items()
    for group in groups
    for path in sorted((CONF / group).glob("*.yaml"))
]


@pytest.fixture(autouse=True)
def _clean_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def test_no_group_is_forgotten() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {group for used in USED.values() for group in used}


@pytest.mark.parametrize(("command", "group", "option"), OPTIONS)
def test_every_option_composes_and_fits_its_class(command: str, group: str, option: str) -> None:
    config = compose(command, f"{group}={option}", *needed(command, group, option))
    check_given(config)
    check_targets(config)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(
    ("command", "given", "layers"),
    [
        ("extract", ["vision=dinov2_vits14"], ["6.attn", "7.attn", "8.attn"]),
        ("extract", ["vision=dinov2_vits14", "vision.layers=null"], None),
        ("extract", ["vision=dinov2_vits14", "vision.layers=[-1]"], [-1]),
        ("extract", ["vision=dinov2_vits14", "vision.layers=[6.attn,8]"], ["6.attn", 8]),
        ("extract", [], None),
        ("evaluate", ["vision=dinov2_vits14"], None),  # as checkpoints without a word of it mean
    ],
)
def test_only_extraction_chooses_other_blocks(
    command: str, given: list[str], layers: list[int | str] | None
) -> None:
    required = ["store=s", "source.images=i", "source.annotations=a"]
    config = compose(command, *given, *(required if command == "extract" else ["checkpoint=c"]))
    assert config.vision.layers == layers


def test_the_refinements_reach_the_segmenter() -> None:
    given = ["refinement=knn", "refinement.k=8", "pamr=true", "pamr_whole_image=true"]
    config = compose("evaluate", *given, "checkpoint=c", "benchmark=mosaic")
    made = build_segmenter(
        config, nn.Identity(), ProjectionLayer(8, 8), command.build(config.benchmark)
    )
    assert made.knn is not None and made.knn.k == 8
    assert made.pamr is not None and made.pamr.whole_image


def test_a_typed_key_and_a_class_of_ones_own_are_not_dropped() -> None:
    given = ["checkpoint=c", "benchmark=mosaic", "refinement=pamr", "pamr_whole_image=true"]
    config = compose("evaluate", *given)
    name_refinement(config)
    assert config.pamr and config.pamr_whole_image
    bench, psi = command.build(config.benchmark), ProjectionLayer(8, 8)
    made = build_segmenter(config, nn.Identity(), psi, bench)
    assert made.pamr is not None and made.pamr.whole_image and made.knn is None
    config = compose("evaluate", *given[:2])
    with open_dict(config):
        config.refinement = {"_target_": "torch.nn.Flatten"}
    name_refinement(config)
    assert isinstance(build_segmenter(config, nn.Identity(), psi, bench).knn, nn.Flatten)


def widths(experiment: str) -> tuple[int, int]:
    projection = compose("train", f"experiment={experiment}", "store=s").projection
    return projection.text_dim or 384, projection.vision_dim or 384


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`stores(text width, vision width)`: 24 random images of that shape, all fields."""
    made: dict[tuple[int, int], Path] = {}

    def make(text: int, vision: int) -> Path:
        if (text, vision) not in made:
            heads = vision // 64 or 2
            fields = {
                "patch_tokens": (16, vision),
                "self_attn_maps": (heads, 16),
                "avg_self_attn_out": (vision,),
                "disentangled_self_attn": (heads, vision),
            }
            folder = tmp_path_factory.mktemp("store")
            made[text, vision] = tiny_store(folder, fields, images=24, text_dim=text)
        return made[text, vision]

    return make


def two_steps(store: Path, folder: Path, *overrides: str) -> None:
    run(
        "train",
        *overrides,  # flags must come first
        f"store={store}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_steps=2",
        f"hydra.run.dir={folder}",
        *TRAIN,
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(experiment: str, stores: Any, tmp_path: Path) -> None:
    text, vision = widths(experiment)
    cosine = compose("train", f"experiment={experiment}", "store=s").scheduler._target_
    warmup = ["scheduler.warmup_steps=1"] if "cosine" in cosine else []
    words = ["words=none"] if experiment.endswith("_words") else []  # tests/training/test_words.py
    two_steps(stores(text, vision), tmp_path, f"experiment={experiment}", *warmup, *words)
    projection = load_projection(tmp_path / "projection.safetensors")
    assert (projection.text_dim, projection.vision_dim) == (text, vision)
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert saved.name == experiment
    assert saved.projection.vision_dim == vision


@pytest.mark.parametrize("name", ["vitb", "vitl", "dinov3_vitb", "dinov3_vitl", "vits"])
def test_faithful_recipes_are_those_of_the_paper(name: str) -> None:
    """Talk2DINO, implementation details, and the original's configs."""
    config = compose("train", f"experiment={name}_infonce", "store=s")
    assert config.similarity._target_.endswith(".MaxScore")
    assert config.optimizer._target_ == "torch.optim.Adam"
    assert (config.optimizer.lr, config.data.batch_size, config.trainer.max_epochs) == (
        1e-4,
        128,
        100,
    )
    assert config.loss.normalize_by_batch_squared
    assert not config.loss.learnable_logit_scale
    assert not config.loss.mask_same_image
    assert config.loss.logit_scale == pytest.approx(1 / 0.07)
    assert config.scheduler._target_.endswith("constant_with_warmup")
    assert config.scheduler.warmup_steps == 0
    assert config.data.captions == "all"


@pytest.mark.parametrize(
    "similarity", sorted(path.stem for path in (CONF / "similarity").glob("*.yaml"))
)
def test_every_similarity_trains(similarity: str, stores: Any, tmp_path: Path) -> None:
    two_steps(
        stores(6, 10),
        tmp_path,
        "experiment=vits_infonce",
        "projection.text_dim=6",
        "projection.vision_dim=10",
        f"similarity={similarity}",
        "trainer.max_steps=1",
        "loss.normalize_by_batch_squared=false",
    )
    losses = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in losses


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=triplet"],
        ["projection=linear", "projection.text_dim=6", "projection.vision_dim=10"],
        ["val_similarity=dense"],
        ["~logger", "~scheduler", "data.captions=one_per_image"],
        ["data.val_fraction=0", "trainer.accumulate_grad_batches=2"],
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "optimizer=adamw"],
        ["checkpoint.save_top_k=2", "checkpoint.monitor=train/loss", "checkpoint.mode=min"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_choices_train(overrides: list[str], stores: Any, tmp_path: Path) -> None:
    width = ["projection.text_dim=6", "projection.vision_dim=10"]
    two_steps(stores(6, 10), tmp_path, "experiment=vits_infonce", *width, *overrides)
    assert (tmp_path / "projection.safetensors").is_file()


TYPOS = [
    ("train", ["optimizer.lrr=1"], "unknown config key optimizer.lrr", "optimizer.lr?"),
    (
        "train",
        ["trainer.max_epoch=3"],
        "unknown config key trainer.max_epoch ",
        "trainer.max_epochs?",
    ),
    ("train", ["sed=1"], "unknown config key sed ", "seed?"),
    ("train", ["dta.batch_size=3"], "unknown config key dta.batch_size", "data.batch_size?"),
    ("train", ["data.batchsize=3"], "unknown config key data.batchsize", "data.batch_size?"),
    ("train", ["similarity.temperature=1"], "similarity.temperature", "valid here|mean"),
    ("train", ["+optimizer.lrr=1"], "unknown config key optimizer.lrr", "optimizer.lr?"),
    ("train", ["+sed=1"], "sed", "seed?"),
    ("train", ["similarity=max_scoer"], "similarity=max_scoer", "similarity=max_score?"),
    (
        "train",
        ["experiment=vitz_infonce"],
        "experiment=vitz_infonce",
        "experiment=vitb_infonce|vit",
    ),
    ("train", ["simlarity=dense"], "simlarity", "similarity?"),
    ("train", ["seed=x"], "seed=x", "whole number"),
    ("train", ["data.batch_size=many"], "data.batch_size=many", "whole number"),
    ("train", ["optimizer.lr=fast"], "optimizer.lr='fast'", "float"),
    ("train", ["trainer.max_epochs=abc"], "trainer.max_epochs='abc'", "int"),
    ("train", ["trainer.deterministic=3"], "trainer.deterministic=3", "bool"),
    ("train", ["loss.logit_scale=hot"], "loss.logit_scale='hot'", "expected float"),
    ("train", ["loss.mask_same_image=1"], "loss.mask_same_image=1", "expected bool"),
    ("train", ["projection.activation=gelu"], "projection.activation='gelu'", "tanh"),
    ("train", ["loss._target_=talk2dino.Nothing"], "loss._target_", "Nothing"),
    ("train", ["store=[1"], "store=[1", ""),
    ("train", ["seed"], "seed", "="),
    ("train", ["logger=null"], "logger=null", "write ~logger"),
    ("train", ["checkpoint.moniter=a"], "unknown config key checkpoint.moniter", "monitor?"),
    ("train", ["checkpoint.monitor=val/recall"], "monitor=val/recall", "val/text_to_image/recall"),
    ("train", ["checkpoint.every_n_steps=0"], "checkpoint.every_n_steps=0", "use 1 to"),
    (
        "train",
        ["checkpoint.monitor=train/loss", "checkpoint.save_top_k=0"],
        "save_top_k=0",
        "use 1",
    ),
    ("train", ["checkpoint.monitor=train/loss", "checkpoint.mode=up"], "checkpoint.mode=up", "min"),
    ("train", ["early_stopping.patients=2"], "early_stopping.patients", "patience?"),
    (
        "train",
        ["early_stopping.patience=2", "data.val_fraction=0"],
        "early_stopping.monitor=val/text_to_image/recall@1",
        "nothing to validate on",
    ),
    ("train", ["ema.decay=1.5"], "ema.decay=1.5", "use 0 to 1"),
    ("train", ["ema.dcay=0.9"], "ema.dcay", "ema.decay?"),
    ("train", ["sample_segmentations.image=[a]"], "sample_segmentations.image", "images?"),
    (
        "train",
        ["sample_segmentations.images=[a.png]"],
        "sample_segmentations.classes",
        "[cat,sofa]",
    ),
    ("train", ["resume=maybe"], "resume=maybe", "bool"),
    ("train", ["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt", "no such file"),
    ("train", ["optimizer.fused=fast"], "optimizer.fused='fast'", "bool"),
    (
        "train",
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "optimizer.fused=true"],
        "optimizer.fused=true",
        "optimizer.fused=null",
    ),
    ("train", ["trainer.num_node=2"], "trainer.num_node", "trainer.num_nodes?"),
    ("train", ["sweep.metrc=a"], "sweep.metrc", "sweep.metric?"),
    ("train", ["sweep.n_trials=3"], "sweep.n_trials=3", "sweep=optuna"),
    ("train", ["sweep=optna"], "sweep=optna", "sweep=optuna?"),
    ("train", ["launcher=jolib"], "launcher=jolib", "launcher=joblib?"),
    ("train", ["+data.extra=1"], "unknown config key data.extra", "did you mean data."),
    ("extract", ["vision.image_sise=3"], "vision.image_sise", "vision.image_size?"),
    ("extract", ["vision.image_size=big"], "vision.image_size='big'", "expected int"),
    ("extract", ["source=cocoa"], "source=cocoa", "source=coco_captions?"),
    ("extract", ["features.dtype=3.5", "features.image_field=[a]"], "features.image_field", "s?"),
    ("evaluate", ["benchmark=mosiac"], "benchmark=mosiac", "benchmark=mosaic?"),
    ("evaluate", ["benchmark.strde=3"], "benchmark.strde", "benchmark.stride?"),
    ("evaluate", ["benchmark.window=wide"], "benchmark.window='wide'", "int"),
    ("evaluate", ["pamr=perhaps"], "pamr=perhaps", "bool"),
    ("evaluate", ["vision=dinov2_vits"], "vision=dinov2_vits", "vision=dinov2_vits14?"),
    ("embed", ["outptu=x"], "outptu", "output?"),
    ("search", ["qeury=x"], "qeury", "query?"),
    ("map", ["meters_per_pixle=1"], "meters_per_pixle", "meters_per_pixel?"),
    ("segment", ["text=clip"], "text=clip", "text=clip_vitb16?"),
    ("segment", ["clases=[cat]"], "clases", "classes?"),
    ("segment", ["short_side=tall"], "short_side=tall", "whole number"),
    ("segment", ["background=grey"], "background=grey", "give a score 0..1, or true"),
]


@pytest.mark.parametrize(
    ("command", "overrides", "named", "near"),
    TYPOS,
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_typos_are_one_line(
    command: str,
    overrides: list[str],
    named: str,
    near: str,
    stores: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [
        item for item in GIVEN[command] if item.partition("=")[0] != overrides[0].split("=")[0]
    ]
    if command == "train":
        given = [f"store={stores(4, 6)}", *given[1:]] if given[0] == "store=s" else given
        given.append("experiment=vits_infonce") if "experiment" not in overrides[0] else None
    line = fails(capfd, command, *given, *overrides, f"hydra.run.dir={tmp_path}")
    assert named in line
    assert any(part in line for part in near.split("|")), line
    assert len(line) < 400, line


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_values_are_named(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(capfd, command, f"hydra.run.dir={tmp_path}")
    for item in GIVEN[command]:
        key = item.partition("=")[0]
        assert key in line or key.startswith("projection.")
    assert "not given" in line


@pytest.mark.parametrize(
    ("text", "named", "near"),
    [
        ("optimzer:\n  lr: 1.0", "optimzer", "optimizer?"),
        ("optimizer:\n  lrr: 1.0", "optimizer.lrr", "optimizer.lr?"),
        ("data:\n  batchsize: 1", "data.batchsize", "data.batch_size?"),
        ("data:\n  batch_size: many", "batch_size", "Integer"),
        ("trainer:\n  max_epochs: [1]", "trainer.max_epochs=[1]", "int"),
        ("defaults:\n  - override /loss: infonze", "infonze", "infonce"),
        ("defaults:\n  - override /lss: infonce", "lss", ""),
        ("optimizer: [1", "mine.yaml", ""),
    ],
    ids=["node", "class key", "data key", "type", "list", "option", "group", "yaml"],
)
def test_errors_in_an_experiment_file_are_one_line(
    text: str,
    named: str,
    near: str,
    stores: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    line = fails(
        capfd,
        "train",
        "--config-dir",
        tmp_path,
        "experiment=mine",
        f"store={stores(4, 6)}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert named in line
    assert near in line


def test_a_good_experiment_file_of_ones_own_trains(stores: Any, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /loss: triplet\nloss:\n  margin: 0.1\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    two_steps(stores(4, 6), tmp_path / "run", "--config-dir", str(tmp_path), "experiment=mine")
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert saved.loss.margin == 0.1
    assert saved.projection.vision_dim == 6


def test_ddp_in_a_sweep_is_refused(
    stores: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(
        capfd,
        "train",
        "-m",
        "experiment=vits_infonce",
        "projection.text_dim=4",
        "projection.vision_dim=6",
        f"store={stores(4, 6)}",
        "trainer=cpu",
        "trainer.strategy=ddp",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert "trainer.strategy=ddp inside a sweep" in line


def test_a_sweep_trains_once_per_value(stores: Any, tmp_path: Path) -> None:
    run(
        "train",
        "-m",
        "experiment=vits_infonce",
        "projection.text_dim=4",
        "projection.vision_dim=6",
        f"store={stores(4, 6)}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_steps=1",
        "seed=0,1",
        *TRAIN,
        f"hydra.sweep.dir={tmp_path}",
    )
    found = sorted(path.parent.name for path in tmp_path.glob("*/projection.safetensors"))
    assert found == ["0", "1"]


def test_errors_of_other_processes_become_their_line() -> None:
    """Loader workers and spawned ranks hand over a traceback as text."""
    relayed = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 3, in f\ntalk2dino.errors.DataError: a.png: is broken\n'
    )
    assert user_message(RuntimeError(relayed)) == "a.png: is broken"
    assert user_message(DataError(relayed)) == "a.png: is broken"
    assert user_message(DataError("plain")) == "plain"
    assert user_message(RuntimeError("a bug")) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_groups(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        run(command, "--help")
    except SystemExit as stopped:
        assert not stopped.code
    out = capfd.readouterr().out
    for group in ("experiment", "vision", "text", "source", "benchmark", *USED[command]):
        assert f"{group}: " in out


@pytest.mark.parametrize("name", SCHEMAS)
def test_values_stand_in_yaml_only(name: str) -> None:
    """A schema says types; what it holds besides is None, for keys that no YAML of it states."""

    def walk(schema: Any, stated: dict[str, Any], path: str) -> None:
        hints = get_type_hints(schema)
        for item in fields(schema):
            kind, key = hints[item.name], f"{path}{item.name}"
            if is_dataclass(kind):
                walk(kind, stated[item.name], f"{key}.")
            elif item.default is not MISSING:
                assert item.default is None, f"{key}: the default belongs into conf/{name}.yaml"
                assert item.name not in stated, f"{key}: conf/{name}.yaml has the default"
            assert item.default_factory is MISSING, key

    stated = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    walk(SCHEMAS[name], stated, "")
    choices = [item for item in stated["defaults"] if isinstance(item, dict)]
    groups = {key for choice in choices for key in choice} - {"launcher", "experiment"}
    groups = {key for key in groups if not key.startswith("optional ")}  # of another group's keys
    plain = set(stated) - {"defaults", "hydra"} | groups
    assert {item.name for item in fields(SCHEMAS[name])} == {key for key in plain if "/" not in key}
