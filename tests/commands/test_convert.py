"""`talk2dino.convert`: weights both ways without loss, stores checked in full, all tasks."""

from __future__ import annotations

import inspect
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from talk2dino import load_projection
from talk2dino.alignment.checkpoint import describe_projection, read_checkpoint, save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import (
    DoubleMLP,
    Projection,
    ProjectionLayer,
    VisualProjectionLayer,
)
from talk2dino.config.quoting import quote_overrides
from talk2dino.config.schemas import ConvertConfig
from talk2dino.convert import TASKS, task_first
from tests.helpers.pipeline import fails, run
from tests.helpers.shared import shared_path
from tests.helpers.stores import tiny_store

PROJECTIONS: list[Projection] = [
    ProjectionLayer(6, 8),
    ProjectionLayer(6, 8, hidden_layers=2, head_weighting="static", num_heads=4),
    DoubleMLP(6, 8),
    VisualProjectionLayer(6, 8, hidden_dim=5),
]
SPECS: dict[str, Any] = {
    "vision": {"_target_": "talk2dino.encoders.vision.TimmVisionEncoder", "name": "v"},
    "text": {"_target_": "talk2dino.encoders.text.OpenClipTextEncoder", "name": "t"},
}


def weights(source: Path, output: Path, *overrides: str) -> dict[str, Tensor]:
    """Run `convert weights`; the tensors of what it wrote."""
    run("convert", "weights", f"input={source}", f"output={output}", *overrides)
    return load_projection(output).state_dict()


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
def test_weights_go_both_ways(projection: Projection, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in projection.state_dict().items()}
    save_projection(projection, tmp_path / "original.pth")
    assert_equal(weights(tmp_path / "original.pth", tmp_path / "new.safetensors"), state)
    assert_equal(weights(tmp_path / "new.safetensors", tmp_path / "sub" / "back.pth"), state)
    back = torch.load(tmp_path / "sub" / "back.pth", weights_only=True)
    assert_equal(back, state)
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert found == ["new.safetensors", "original.pth", "sub/back.pth"]  # and no log, no outputs/


def test_the_encoders_are_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_projection(ProjectionLayer(512, 768), tmp_path / "a.pth")
    chosen = ("vision=dinov3_vitb16", "vision.rope_in_attention=false", "text=clip_vitb16")
    weights(tmp_path / "a.pth", tmp_path / "b.safetensors", *chosen)
    checkpoint = read_checkpoint(tmp_path / "b.safetensors")
    assert checkpoint.vision is not None and checkpoint.text is not None
    assert checkpoint.vision["_target_"] == "talk2dino.encoders.vision.TimmVisionEncoder"
    assert checkpoint.vision["name"] == "vit_base_patch16_dinov3.lvd1689m"
    assert checkpoint.vision["rope_in_attention"] is False
    assert checkpoint.text["name"] == "ViT-B-16-quickgelu"
    assert "vision: vit_base_patch16_dinov3" in capfd.readouterr().out
    weights(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "text=minilm")
    again = read_checkpoint(tmp_path / "c.safetensors")
    assert again.vision == checkpoint.vision  # kept
    assert again.text is not None and again.text["weights"] == "bundled"  # replaced
    weights(tmp_path / "c.safetensors", tmp_path / "d.pth")
    assert "encoders and its activation are not written" in capfd.readouterr().out


def test_a_lightning_checkpoint_keeps_its_metadata(tmp_path: Path) -> None:
    psi = ProjectionLayer(6, 8, activation="relu")
    state = {f"projection.{name}": value for name, value in psi.state_dict().items()}
    entry = {"projection": describe_projection(psi), **SPECS, "note": 1}
    torch.save({"state_dict": state, "talk2dino": entry}, tmp_path / "last.ckpt")
    assert_equal(weights(tmp_path / "last.ckpt", tmp_path / "a.safetensors"), psi.state_dict())
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert found.projection.hyperparameters["activation"] == "relu"
    assert {"vision": found.vision, "text": found.text, **found.extra} == SPECS | {"note": 1}


def test_the_activation_of_bare_tensors_is_said(tmp_path: Path) -> None:
    save_projection(ProjectionLayer(6, 8, activation="relu"), tmp_path / "a.pth")
    for word, want in (("tanh", "tanh"), ("relu", "relu"), ("null", None)):
        weights(tmp_path / "a.pth", tmp_path / f"{word}.safetensors", f"activation={word}")
        arguments = load_projection(tmp_path / f"{word}.safetensors").hyperparameters
        assert arguments["activation"] == want


@pytest.mark.parametrize("name", ["vitb_mlp_infonce.pth", "dinov3_vitb_mlp_infonce.pth"])
def test_released_weights(name: str, tmp_path: Path) -> None:
    source = shared_path("weights") / name
    original = torch.load(source, map_location="cpu", weights_only=True)
    vision = "dinov3_vitb16" if "dinov3" in name else "dinov2_vitb14_reg"
    new = tmp_path / "new.safetensors"
    assert_equal(weights(source, new, f"vision={vision}", "text=clip_vitb16"), original)
    weights(new, tmp_path / "back.pth")
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), original)
    text = torch.randn(4, 512)
    with torch.no_grad():
        got, want = (load_projection(file)(text) for file in (tmp_path / "back.pth", source))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["weights"], "input: required but not given"),
        (["weights", "input=a.pth"], "output: required but not given"),
        (["weights", "input=a.pth", "output=a.pth"], "output=a.pth: is there already"),
        (["weights", "input=a.pth", "output=b.ckpt"], "must end in .safetensors or .pth"),
        (["weights", "input=none.pth", "output=b.pth"], "checkpoint=none.pth: no such file"),
        (["weights", "input=junk.pth", "output=b.pth"], "checkpoint=junk.pth: not a checkpoint"),
        (["weights", "input=last.safetensors", "output=b.pth"], ".pth has no CLIPLastLayer"),
        (["weights", "input=a.pth", "output=junk.pth/b.pth"], "cannot create this folder"),
        (["weights", "input=a.pth", "output=b.pth", "activation=gelu"], "'gelu'"),
        (["weights", "input=a.pth", "output=b.pth", "vision=timm"], "vision.name: required"),
        (["weights", "inptu=a.pth"], "did you mean input?"),
        (["weights", "input=a.pth", "output=b.pth", "text=clip"], "did you mean text=clip_vitb16?"),
        (["verify"], "store: required but not given"),
        (["features", "store=s"], "input: required but not given"),
        (["features", "input=a.pth", "store=s"], "input=a.pth: no list 'images'"),
        (["features", "input=none.pth", "store=s"], "input=none.pth: no such file"),
        (["tars", "input={0..2}.tar", "store=s"], "input: 0.tar: no such file"),
        (["archive", "store=nowhere", "output=o"], "manifest.json: not found"),
        (["unarchive", "store=nowhere"], "output: required but not given"),
        (["coco_object", "output=o"], "input: required but not given"),
        (
            ["archive", "store=s", "output=o", "dtype=float32"],
            "dtype: does nothing for archive, which takes store, output; leave it out",
        ),
        (["verify", "input=s"], "input: does nothing for verify, which takes store; leave it out"),
        (["verify", "store=s", "vision=dinov2_vits14"], "vision: does nothing for verify"),
        (["verfy", "store=a"], "task=verfy: unknown"),
        ([], "task: required but not given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_projection(ProjectionLayer(6, 8), tmp_path / "a.pth")
    save_projection(CLIPLastLayer(6, 8, 4, 2), tmp_path / "last.safetensors")
    (tmp_path / "junk.pth").write_text("junk")
    before = (tmp_path / "a.pth").read_bytes()
    assert said in fails(capfd, "convert", *arguments)
    assert not (tmp_path / "b.pth").exists()
    assert (tmp_path / "a.pth").read_bytes() == before


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tiny_store(tmp_path / "store", {"cls_token": (4,)}, images=10, images_per_shard=4)


def verify(store: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit status and printed lines."""
    capfd.readouterr()
    status = 0
    try:
        run("convert", "verify", f"store={store}")
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return status, capfd.readouterr().out.splitlines()


def test_a_sound_store(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, lines = verify(store, capfd)
    assert status == 0
    assert lines == [f"{store}: sound, 3 shards, 10 images, 10 captions"]


def test_every_bad_shard_is_named(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = store / "train-00000.h5"
    content = bytearray(first.read_bytes())
    content[-3] ^= 1  # a flipped bit
    first.write_bytes(content)
    (store / "train-00002.h5").unlink()
    status, lines = verify(store, capfd)
    assert status == 1
    assert [line.partition(":")[0] for line in lines] == ["train-00000.h5", "train-00002.h5"]
    assert "SHA-256" in lines[0]
    assert "missing" in lines[1]
    shutil.rmtree(store)
    status, lines = verify(store, capfd)
    assert status == 1
    assert "manifest.json: not found" in lines[0]


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["weights", "--help"]):
        try:
            run("convert", *arguments)
        except SystemExit as stopped:
            assert not stopped.code
        out = capfd.readouterr().out
        for word in ("weights input=FILE output=FILE", "verify store=DIR", "vision: ", "text: "):
            assert word in out
        for task in TASKS:
            assert re.search(rf"^ +{task} +\w+=", out, re.M), task


def test_tasks_take_what_the_config_has() -> None:
    keys = {field.name for field in fields(ConvertConfig)}
    for name, task in TASKS.items():
        parameters = inspect.signature(task).parameters
        assert parameters.keys() <= keys - {"task"}, name
        for key, parameter in parameters.items():
            if parameter.default is not parameter.empty:
                assert parameter.default is None, f"{name} {key}: conf/convert.yaml has the default"


def test_coco_object_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    masks = tmp_path / "maps" / "val2017"
    masks.mkdir(parents=True)
    stuff = np.array([[0, 1, 89], [91, 181, 255]], np.uint8)  # person, bicycle, toothbrush; stuff
    for number in range(3):
        Image.fromarray(stuff).save(masks / f"{number:012d}.png")
    command = ("convert", "coco_object", f"input={tmp_path / 'maps'}", f"output={tmp_path / 'out'}")
    run(*command, "num_workers=0")
    assert "3 label maps written" in capfd.readouterr().out
    written = sorted((tmp_path / "out" / "val2017").iterdir())
    assert written[0].name == "000000000000_instanceTrainIds.png"
    np.testing.assert_array_equal(np.asarray(Image.open(written[2])), [[1, 2, 80], [0, 0, 0]])
    run(*command)
    assert "0 label maps written" in capfd.readouterr().out
    assert "no such folder" in fails(capfd, *command[:2], "input=nowhere", "output=out")


def test_the_task_stands_first() -> None:
    assert task_first(["verify", "store=a"]) == ["task=verify", "store=a"]
    for same in ([], ["--help"], ["task=verify", "store=a"]):
        assert task_first(same) == same


def test_brace_ranges_need_no_second_quotes() -> None:
    tars = "cc3m/{00000..00331}.tar"
    assert quote_overrides([f"source.tars={tars}", "-m"], None) == [f"source.tars='{tars}'", "-m"]
    assert quote_overrides(["input={0..2}.tar"], ConvertConfig) == ["input='{0..2}.tar'"]
    listed = f"source.tars=[a.tar,{tars}]"
    assert quote_overrides([listed], None) == [f"source.tars=['a.tar','{tars}']"]
    for same in (f"source.tars='{tars}'", f'a="{tars}"', f"a=['{tars}']", "a={b:1}", "a=${b}", "x"):
        assert quote_overrides([same], None) == [same]
