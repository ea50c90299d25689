"""Checkpoints: every format round-trips, foreign and broken files are refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from talk2dino.alignment import DoubleMLP, ProjectionLayer, VisualProjectionLayer
from talk2dino.alignment.checkpoint import (
    describe_projection,
    load_projection,
    read_checkpoint,
    save_projection,
)
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Projection
from talk2dino.errors import CheckpointError
from tests.helpers.shared import shared_path

PROJECTIONS: list[Projection] = [
    ProjectionLayer(6, 8),
    ProjectionLayer(6, 8, hidden_layers=0, activation=None),
    ProjectionLayer(6, 8, hidden_layers=3, activation="relu"),
    ProjectionLayer(6, 8, head_weighting="static", num_heads=4),
    ProjectionLayer(6, 8, head_weighting="conditioned", num_heads=4),
    DoubleMLP(6, 8, hidden_layers=2),
    VisualProjectionLayer(6, 8),
    VisualProjectionLayer(6, 8, hidden_dim=5, activation="sigmoid"),
    CLIPLastLayer(6, 8, width=12, num_text_heads=2, quick_gelu=True),
]
ENCODERS: dict[str, Any] = {"vision": {"name": "v", "image_size": 448}, "text": {"name": "t"}}


def lightning_checkpoint(projection: Projection, path: Path) -> Path:
    state = {f"projection.{key}": value for key, value in projection.state_dict().items()}
    entry = {"projection": describe_projection(projection), **ENCODERS, "note": 1}
    torch.save(
        {"state_dict": state | {"loss.logit_scale": torch.ones(())}, "talk2dino": entry}, path
    )
    return path


def assert_same(got: Projection, want: Projection) -> None:
    assert type(got) is type(want)
    assert got.hyperparameters == want.hyperparameters
    assert got.state_dict().keys() == want.state_dict().keys()
    for key, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], value), key
    assert not got.training


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_our_formats_round_trip(projection, suffix, tmp_path) -> None:
    path = tmp_path / "run" / f"projection.{suffix}"
    if suffix == "ckpt":
        path.parent.mkdir()
        lightning_checkpoint(projection, path)
    else:
        save_projection(projection, path, {**ENCODERS, "note": 1})
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.projection, projection)
    assert (checkpoint.vision, checkpoint.text) == (ENCODERS["vision"], ENCODERS["text"])
    assert checkpoint.extra == {"note": 1}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def written_in_its_tensors(projection: Projection) -> bool:
    """One linear layer from image to text has the tensors of one from text to image."""
    one_way = isinstance(projection, VisualProjectionLayer) and projection.hidden_dim is None
    return not one_way and not isinstance(projection, CLIPLastLayer)


@pytest.mark.parametrize(
    "projection",
    [p for p in PROJECTIONS if written_in_its_tensors(p)],
    ids=lambda p: type(p).__name__,
)
def test_original_format_is_inferred_from_the_tensors(projection, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    save_projection(projection, path)
    assert all(map(torch.is_tensor, torch.load(path, weights_only=True).values()))
    checkpoint = read_checkpoint(path, activation=projection.hyperparameters["activation"])
    assert_same(checkpoint.projection, projection)
    assert checkpoint.vision is None and checkpoint.text is None and checkpoint.extra == {}


def test_legacy_names_and_bare_safetensors_load(golden, tmp_path) -> None:
    arrays = golden("projection_project")
    prefix = "legacy/param/"
    state = {k[len(prefix) :]: v.contiguous() for k, v in arrays.items() if k.startswith(prefix)}
    torch.save(state, tmp_path / "old.pth")
    save_file(state, tmp_path / "old.safetensors")
    for name in ("old.pth", "old.safetensors"):
        psi = load_projection(tmp_path / name)
        assert isinstance(psi, ProjectionLayer)
        torch.testing.assert_close(psi(arrays["in/text"]), arrays["legacy/out_text"])


@pytest.mark.parametrize("name", ["vitb_mlp_infonce.pth", "dinov3_vitb_mlp_infonce.pth"])
def test_released_weights_load_and_convert(name, tmp_path) -> None:
    path = shared_path("weights") / name
    psi = load_projection(path)
    assert psi.hyperparameters["text_dim"] == 512 and psi.hyperparameters["vision_dim"] == 768
    assert psi.hyperparameters["hidden_layers"] == 1
    weights = torch.load(path, map_location="cpu", weights_only=True)
    text = torch.randn(4, 512)
    hidden = torch.tanh(text @ weights["linear_layer.weight"].T + weights["linear_layer.bias"])
    want = hidden @ weights["hidden_layers.0.weight"].T + weights["hidden_layers.0.bias"]
    torch.testing.assert_close(psi(text), want, atol=1e-5, rtol=1e-4)
    save_projection(psi, tmp_path / "projection.safetensors", ENCODERS)
    assert_same(load_projection(tmp_path / "projection.safetensors"), psi)
    save_projection(psi, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_metadata_is_readable_json(tmp_path) -> None:
    path = tmp_path / "projection.safetensors"
    save_projection(ProjectionLayer(6, 8), path, ENCODERS)
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["talk2dino"])
    assert entry["projection"]["_target_"] == "talk2dino.alignment.projection.ProjectionLayer"
    assert entry["projection"]["text_dim"] == 6 and entry["vision"] == ENCODERS["vision"]


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"projection": describe_projection(ProjectionLayer(6, 8)) | changes}


def test_missing_and_broken_files(tmp_path) -> None:
    assert "no such file" in refused(tmp_path / "nothing.ckpt")
    assert "the folder holds no projection.safetensors" in refused(tmp_path)
    for name in ("text.ckpt", "text.safetensors", "empty.pth"):
        path = tmp_path / name
        path.write_bytes(b"" if "empty" in name else b"not a checkpoint at all")
        assert "not a" in refused(path)
    whole = lightning_checkpoint(ProjectionLayer(6, 8), tmp_path / "whole.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[:-200])
    assert "not a checkpoint" in refused(cut)


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "executed"))


def test_code_in_a_checkpoint_never_runs(tmp_path) -> None:
    target = tmp_path / "executed"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Payload(target)}, protocol=2))
    refused(tmp_path / "evil.pth")
    refused(saved({"state_dict": {}, "talk2dino": Payload(target)}, tmp_path / "evil.ckpt"))
    for name in ("os.system", "talk2dino.alignment.projection.nn.Linear", "x.ProjectionLayer"):
        content = {"state_dict": {}, "talk2dino": entry(_target_=name)}
        assert repr(name) in refused(saved(content, tmp_path / "evil.ckpt"))
    assert not target.exists()


def test_foreign_and_ill_fitting_checkpoints(tmp_path) -> None:
    path = tmp_path / "file.ckpt"
    foreign = {"state_dict": {"model.w": torch.ones(1)}, "pytorch-lightning_version": "2"}
    assert "another project" in refused(saved(foreign, path))
    assert "no linear_layer.weight" in refused(saved({"model.w": torch.ones(1)}, path))
    assert "holds list" in refused(saved([torch.ones(1)], path))
    state = ProjectionLayer(6, 8).state_dict()
    assert "size mismatch" in refused(
        saved(state | {"hidden_layers.0.weight": torch.ones(3, 3)}, path)
    )
    assert "Unexpected" in refused(saved(state | {"other": torch.ones(1)}, path))
    ours = {f"projection.{key}": value for key, value in state.items()}
    assert "[8, 6]" in refused(saved({"state_dict": ours, "talk2dino": entry(text_dim=7)}, path))
    assert "Missing" in refused(saved({"state_dict": {}, "talk2dino": entry()}, path))
    assert "cannot be built" in refused(
        saved({"state_dict": {}, "talk2dino": entry(depth=1)}, path)
    )
    assert "cannot be built" in refused(
        saved({"state_dict": {}, "talk2dino": entry(activation="gelu")}, path)
    )
    assert "not a dictionary" in refused(saved({"state_dict": {}, "talk2dino": 1}, path))
    assert "None" in refused(saved({"state_dict": {}, "talk2dino": {}}, path))
    assert "no state_dict" in refused(saved({"talk2dino": entry()}, path))


def test_saving_refuses_unknown_suffix_and_leaves_the_old_file(tmp_path) -> None:
    psi = ProjectionLayer(6, 8)
    with pytest.raises(CheckpointError, match=r"\.safetensors or \.pth"):
        save_projection(psi, tmp_path / "projection.bin")
    path = tmp_path / "projection.safetensors"
    save_projection(psi, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="plain values"):
        save_projection(psi, path, {"vision": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_class_under_the_path_of_an_earlier_version_loads(tmp_path) -> None:
    layer = VisualProjectionLayer(6, 8)
    state = {f"projection.{key}": value for key, value in layer.state_dict().items()}
    old = "talk2dino.alignment.visual_projection.VisualProjectionLayer"
    spec = {**layer.hyperparameters, "_target_": old}
    torch.save({"state_dict": state, "talk2dino": {"projection": spec}}, tmp_path / "old.ckpt")
    assert_same(load_projection(tmp_path / "old.ckpt"), layer)
