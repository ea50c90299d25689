"""Repositories in the layout of the original's on the Hub, against the model put together by hand.

They are built with random weights; the real ones could not be seen.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from talk2dino import Talk2DINO, load_projection
from talk2dino.alignment import ProjectionLayer
from talk2dino.alignment.checkpoint import checkpoint_digest, save_projection
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder, original
from talk2dino.errors import CheckpointError, UserError
from tests.helpers.encoders import RELEASED, TINY_CLIP, ByHand, picture, write_repository
from tests.helpers.hub import COMMIT, Hub
from tests.helpers.pipeline import fails, run

TEXTS = ["a cat", "traffic sign"]
SUBSET = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
DINOV2 = {"model_name": "dinov2_tiny14_reg", "clip_model_name": "tiny", "resize_dim": 56}
DINOV3 = {"model_name": "tiny_dinov3", "clip_model_name": "tiny", "resize_dim": 64}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of small shapes under names of their own, in the libraries and in the tables."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", TINY_CLIP)
    monkeypatch.setitem(original.VISION_NAMES, "dinov2_tiny14_reg", "tiny_reg4_dinov2")
    monkeypatch.setitem(original.TEXT_NAMES, "tiny", "tiny-clip")
    monkeypatch.setitem(original.RELEASED, "dinov2_tiny14_reg", ("tiny", "me/tiny"))
    monkeypatch.setitem(original.RELEASED, "tiny_dinov3", ("tinyv3", "me/tiny3"))


@pytest.fixture
def dinov2(_tiny: None) -> ByHand:
    return ByHand("tiny_reg4_dinov2", "tiny-clip")


@pytest.fixture
def dinov3(_tiny: None) -> ByHand:
    return ByHand("tiny_dinov3", "tiny-clip")


def check(model: Talk2DINO, hand: ByHand, size: int, encoders_alone: bool = False) -> None:
    """Patch tokens, attention logits, text embeddings and class scores are those by hand."""
    image = picture(size)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    tokens, logits = hand.image(pixels)
    found = model.vision(pixels)
    torch.testing.assert_close(found.patch_tokens, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.self_attn_maps, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(TEXTS), hand.text(TEXTS), atol=1e-5, rtol=1e-5)
    if encoders_alone:
        return
    torch.testing.assert_close(model.encode_image(image), tokens, atol=1e-5, rtol=1e-5)
    names = ["cat", "traffic sign"]
    scores = torch.sigmoid(F.normalize(tokens, dim=-1) @ hand.classes(names, SUBSET).T)[0]
    rows = size // model.vision.patch_size
    grid = scores.T.reshape(1, 2, rows, rows)
    want = F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)[0]
    got = model.segment(image, names, short_side=size).scores
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dinov2(dinov2: ByHand, tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    write_repository(tmp_path / "m", dinov2.tensors(), DINOV2, dtype, shards)
    model = Talk2DINO.from_pretrained(tmp_path / "m", "cpu")
    assert model.vision.image_size == 56 and model.text.templates == "subset"
    check(model, dinov2, 56)


def test_dinov3_is_read_before_the_rotation(dinov3: ByHand, tmp_path: Path) -> None:
    write_repository(tmp_path, dinov3.tensors(), DINOV3)
    model = Talk2DINO.from_pretrained(tmp_path, "cpu")
    assert model.vision.rope_in_attention is False
    check(model, dinov3, 64)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_layer_scale_under_the_name_that_transformers_gives(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hand: ByHand = request.getfixturevalue(kind)
    renamed = {
        key.replace("gamma_", "weight_").replace(".gamma", ".weight"): value
        for key, value in hand.tensors().items()
    }
    assert renamed.keys() != hand.tensors().keys()
    config, size = (DINOV2, 56) if kind == "dinov2" else (DINOV3, 64)
    write_repository(tmp_path, renamed, config)
    check(Talk2DINO.from_pretrained(tmp_path, "cpu"), hand, size)


def test_dinov3_in_the_names_of_its_publisher(dinov3: ByHand, tmp_path: Path) -> None:
    renamed = {
        key.replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma")
        .replace("reg_token", "storage_tokens"): value
        for key, value in dinov3.tensors().items()
    }
    more = {"model.mask_token": torch.zeros(1, 32), "model.rope_embed.periods": torch.ones(4)}
    write_repository(tmp_path, renamed | more, DINOV3)
    check(Talk2DINO.from_pretrained(tmp_path, "cpu"), dinov3, 64)


def test_unneeded_tensors_may_be_missing(dinov2: ByHand, tmp_path: Path) -> None:
    unneeded = ("clip_model.visual.", "clip_model.logit_scale", "pamr.", "logit_scale")
    left = {k: v for k, v in dinov2.tensors().items() if not k.startswith(unneeded)}
    del left["model.mask_token"]
    write_repository(tmp_path, left, DINOV2)
    check(Talk2DINO.from_pretrained(tmp_path / "model.safetensors", "cpu"), dinov2, 56)


# --- on the Hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_one_download_makes_a_model_that_works_offline(
    dinov2: ByHand, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    hub.serve(write_repository(tmp_path / "m", dinov2.tensors(), DINOV2, shards=shards))
    check(Talk2DINO.from_pretrained("org/Tiny", "cpu"), dinov2, 56)
    assert checkpoint_digest("org/Tiny") == f"org/Tiny@{COMMIT}"
    assert not [one.name for one in hub.sent if one.name.endswith(".py")]
    for name in hub.files:
        if name.endswith("safetensors"):
            assert hub.volume(name) == len(hub.files[name]), name
    hub.files.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(Talk2DINO.from_pretrained("org/Tiny", "cpu"), dinov2, 56)


DINOV2_BLOCK = {
    **{f"norm{n}.{kind}": (768,) for n in "12" for kind in ("weight", "bias")},
    **{f"ls{n}.gamma": (768,) for n in "12"},
    "attn.qkv.weight": (2304, 768),
    "attn.qkv.bias": (2304,),
    "attn.proj.weight": (768, 768),
    "attn.proj.bias": (768,),
    "mlp.fc1.weight": (3072, 768),
    "mlp.fc1.bias": (3072,),
    "mlp.fc2.weight": (768, 3072),
    "mlp.fc2.bias": (768,),
}
DINOV2_REG = {  # of torch.hub's dinov2_vitb14_reg
    "cls_token": (1, 1, 768),
    "pos_embed": (1, 1370, 768),
    "register_tokens": (1, 4, 768),
    "mask_token": (1, 768),
    "patch_embed.proj.weight": (768, 3, 14, 14),
    "patch_embed.proj.bias": (768,),
    "norm.weight": (768,),
    "norm.bias": (768,),
    **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in DINOV2_BLOCK.items()},
}
CLIP_BLOCK = {
    **{f"ln_{n}.{kind}": (512,) for n in "12" for kind in ("weight", "bias")},
    "attn.in_proj_weight": (1536, 512),
    "attn.in_proj_bias": (1536,),
    "attn.out_proj.weight": (512, 512),
    "attn.out_proj.bias": (512,),
    "mlp.c_fc.weight": (2048, 512),
    "mlp.c_fc.bias": (2048,),
    "mlp.c_proj.weight": (512, 2048),
    "mlp.c_proj.bias": (512,),
}
CLIP_TEXT = {  # of OpenAI's ViT-B/16
    "token_embedding.weight": (49408, 512),
    "positional_embedding": (77, 512),
    "text_projection": (512, 512),
    "ln_final.weight": (512,),
    "ln_final.bias": (512,),
    **{
        f"transformer.resblocks.{i}.{name}": shape
        for i in range(12)
        for name, shape in CLIP_BLOCK.items()
    },
}


@pytest.mark.slow
def test_the_shapes_of_the_released_model(released: Path, hub: Hub) -> None:
    """DINOv2 ViT-B with registers at 518 pixels, CLIP ViT-B/16, from the Hub."""
    shapes = {name: tuple(v.shape) for name, v in load_file(released / "model.safetensors").items()}
    wanted = {f"model.{name}": shape for name, shape in DINOV2_REG.items()}
    wanted |= {f"clip_model.{name}": shape for name, shape in CLIP_TEXT.items()}
    unread = ("clip_model.visual.", "clip_model.logit_scale", "logit_scale", "pamr.", "proj.")
    assert {n: s for n, s in shapes.items() if not n.startswith(unread)} == wanted
    hub.serve(released)
    model = Talk2DINO.from_pretrained("lorebianchi98/Talk2DINO-ViTB", "cpu")
    assert hub.volume("model.safetensors") == (released / "model.safetensors").stat().st_size
    check(model, ByHand(*RELEASED), 518, encoders_alone=True)  # large, and small ones show the rest


def proj_bytes(file: Path) -> tuple[int, int]:
    """Bytes of the header, and of the tensors of ψ behind it."""
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    ends = [v["data_offsets"] for k, v in header.items() if k.startswith("proj.")]
    return 8 + length, sum(end - start for start, end in ends)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_projection_is_all_that_is_transferred(
    dinov2: ByHand, hub: Hub, tmp_path: Path, shards: int
) -> None:
    folder = write_repository(tmp_path / "m", dinov2.tensors(), DINOV2, torch.float16, shards)
    hub.serve(folder)
    psi = load_projection("org/Tiny@v1")
    texts = torch.randn(3, 16)
    torch.testing.assert_close(psi(texts), dinov2.psi(texts))
    for file in folder.glob("*.safetensors"):
        header, tensors = proj_bytes(file)
        assert hub.volume(file.name) == header + tensors if tensors else True
        assert hub.volume(file.name) < file.stat().st_size / 5
    revisions = {one.name: one.revision for one in hub.sent}
    assert revisions.pop("config.json") == "v1"
    assert set(revisions.values()) == {COMMIT}  # one state, though v1 may move meanwhile
    assert {one.login for one in hub.sent} == {"Bearer hf_test"}
    vision = TimmVisionEncoder("tiny_reg4_dinov2", "random", image_size=56)
    text = OpenClipTextEncoder("tiny-clip", "random")
    hub.sent.clear()
    model = Talk2DINO.from_pretrained("org/Tiny", "cpu", vision=vision, text=text)
    assert torch.equal(model.projection(texts), psi(texts))
    assert sum(one.bytes for one in hub.sent) < 20_000


def test_a_hub_that_gives_whole_files_only(dinov2: ByHand, hub: Hub, tmp_path: Path) -> None:
    hub.serve(write_repository(tmp_path / "m", dinov2.tensors(), DINOV2))
    hub.ranges = False
    texts = torch.randn(3, 16)
    torch.testing.assert_close(load_projection("org/Tiny")(texts), dinov2.psi(texts))
    hub.sent.clear()
    load_projection("org/Tiny")  # from the cache
    assert hub.volume("model.safetensors") == 0


def test_a_local_projection_is_read_alone(dinov2: ByHand, tmp_path: Path) -> None:
    """The other tensors lie in a shard that is not there."""
    folder = write_repository(tmp_path, dinov2.tensors(), DINOV2)
    only = {k: v for k, v in dinov2.tensors().items() if k.startswith("proj.")}
    rest = {k: v for k, v in dinov2.tensors().items() if k not in only}
    save_file(only, folder / "a.safetensors")
    (folder / "model.safetensors").unlink()
    places = dict.fromkeys(only, "a.safetensors") | dict.fromkeys(rest, "nowhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    texts = torch.randn(3, 16)
    torch.testing.assert_close(load_projection(folder)(texts), dinov2.psi(texts))


# --- what is refused ------------------------------------------------------------------------------


def changed(file: Path, tensors: dict[str, Tensor], without: str = "") -> None:
    state = load_file(file)
    save_file({k: v for k, v in (state | tensors).items() if k != without}, file)


REFUSED: list[tuple[str, Any, str]] = [
    ("proj", {"proj_model": "CLIPLastLayer"}, r"proj_model='CLIPLastLayer': only ProjectionLayer"),
    ("clip", {"clip_model_name": "bert-base"}, r"clip_model_name='bert-base' is none of ViT-B/32"),
    ("average", {"use_avg_text_token": True}, r"use_avg_text_token=true: here class names"),
    ("backbone", {"model_name": "dinov9"}, r"vision\.name='dinov9' is not a timm model"),
    ("number", {"resize_dim": "518"}, r"resize_dim='518': give a text and pixels"),
    ("size", {"resize_dim": 57}, r"image_size=57 is not a multiple of the patch size 14"),
    ("text", "clip_model.ln_final.bias", r"text\.weights='.*1 missing \(ln_final\.bias\)"),
    ("vision", "model.norm.bias", r"vision\.weights='.*1 missing \(norm\.bias\)"),
    ("psi", "proj.linear_layer.bias", r"do not fit ProjectionLayer"),
    ("surplus", "foo.bar", r"weights hold 'foo\.bar', of no part of the model \(model\.\*, clip"),
    ("surplus part", "model.extra", r"vision\.weights='.*1 unknown \(extra\)"),
    ("truncated", None, r"cannot read its weights"),
    ("no file", None, r"neither model\.safetensors nor model\.safetensors\.index\.json is in the"),
    ("no proj", None, r"its weights hold no proj\.\*, which are the projection's"),
    ("config", None, r"config\.json: not a json file"),
    ("no config", None, r"the folder holds no projection\.safetensors, nor the original's config"),
    ("index", None, r"index\.json has no weight_map"),
    ("shard", None, r"cannot read its weights"),
]


@pytest.mark.parametrize(("case", "change", "said"), REFUSED, ids=[case for case, *_ in REFUSED])
def test_one_clear_line(
    dinov2: ByHand, hub: Hub, tmp_path: Path, case: str, change: Any, said: str
) -> None:
    config = DINOV2 | (change if isinstance(change, dict) else {})
    folder = write_repository(tmp_path / "m", dinov2.tensors(), config)
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if case.startswith("surplus"):
        changed(file, {change: torch.zeros(1)})
    elif isinstance(change, str):
        changed(file, {}, without=change)
    elif case == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif case == "no file":
        file.unlink()
    elif case == "no proj":
        save_file({k: v for k, v in load_file(file).items() if k[:5] != "proj."}, file)
    elif case == "config":
        (folder / "config.json").write_text("{")
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case in ("index", "shard"):
        content = {} if case == "index" else {"weight_map": {"proj.linear_layer.weight": "away"}}
        file.unlink()
        index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        Talk2DINO.from_pretrained(folder, "cpu").encode_text("a cat")  # text is built late
    assert "\n" not in str(error.value)
    if case in ("truncated", "surplus", "no proj", "no file"):  # by requests for parts, as well
        hub.serve(folder)
        with pytest.raises(CheckpointError, match=said.replace("in the", "on the")) as error:
            load_projection("org/Tiny")
        assert "\n" not in str(error.value)


# --- commands -------------------------------------------------------------------------------------


def test_the_segment_command(dinov2: ByHand, tmp_path: Path) -> None:
    write_repository(tmp_path / "m", dinov2.tensors(), DINOV2)
    picture(56).save(tmp_path / "a.png")
    run(
        "segment",
        f"checkpoint={tmp_path / 'm'}",
        f"image={tmp_path / 'a.png'}",
        "classes=[cat,traffic sign]",
        "short_side=56",
        "pamr=false",
        "accelerator=cpu",
        f"output={tmp_path / 'out.png'}",
    )
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["weights"] == checkpoint_digest(tmp_path / "m")
    write_repository(tmp_path / "n", dinov2.tensors() | {"logit_scale": torch.ones(())}, DINOV2)
    write_repository(tmp_path / "o", dinov2.tensors(), DINOV2 | {"resize_dim": 70})
    assert len({checkpoint_digest(tmp_path / name) for name in "mno"}) == 3
    tokens, _ = dinov2.image(
        torch.from_numpy(np.asarray(picture(56)).copy()).permute(2, 0, 1)[None] / 255
    )
    scores = F.normalize(tokens, dim=-1) @ dinov2.classes(["cat", "traffic sign"], SUBSET).T
    grid = torch.sigmoid(scores)[0].T.reshape(1, 2, 4, 4)
    want = F.interpolate(grid, (56, 56), mode="bilinear", align_corners=True)[0].argmax(0)
    got = torch.from_numpy(np.asarray(Image.open(tmp_path / "out_labels.png")).astype(np.int64))
    assert (got == want).float().mean() > 0.999


def test_what_is_saved_names_the_repository(dinov2: ByHand, hub: Hub, tmp_path: Path) -> None:
    hub.serve(write_repository(tmp_path / "m", dinov2.tensors(), DINOV2))
    Talk2DINO.from_pretrained("org/Tiny", "cpu").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["vision"]["weights"] == saved["text"]["weights"] == f"org/Tiny@{COMMIT}"
    assert f"org/Tiny@{COMMIT}" in (tmp_path / "saved" / "README.md").read_text()
    check(Talk2DINO.from_pretrained(tmp_path / "saved", "cpu"), dinov2, 56)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_conversion_goes_both_ways(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Theirs to ours to theirs: the same bits of everything that both hold."""
    hand: ByHand = request.getfixturevalue(kind)
    config, size = (DINOV2, 56) if kind == "dinov2" else (DINOV3, 64)
    write_repository(tmp_path / "theirs", hand.tensors(), config)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back"
    run("convert", "weights", f"input={tmp_path / 'theirs'}", f"output={ours}")
    assert ours.stat().st_size < 50_000  # ψ and the names of its encoders
    check(Talk2DINO.from_pretrained(ours, "cpu"), hand, size)
    run("convert", "weights", f"input={ours}", f"output={back}")
    before, after = hand.tensors(), load_file(back / "model.safetensors")
    folded = {"model.cls_token", "model.pos_embed"} if kind == "dinov2" else set()
    missing = before.keys() - after.keys()
    assert after.keys() <= before.keys()
    assert all(k.startswith(("clip_model.visual.", "clip_model.logit", "pamr.")) for k in missing)
    for key in after.keys() - folded - {"logit_scale"}:
        assert torch.equal(after[key], before[key]), key
    if folded:
        first = before["model.cls_token"] + before["model.pos_embed"][:, :1]
        assert torch.equal(after["model.cls_token"], first)
        assert torch.equal(after["model.pos_embed"][:, 1:], before["model.pos_embed"][:, 1:])
        assert not after["model.pos_embed"][:, 0].any()
    written = json.loads((back / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    again = Talk2DINO.from_pretrained(back, "cpu")
    check(again, hand, size)
    capsys.readouterr()
    assert "is there already" in fails(
        capsys, "convert", "weights", f"input={ours}", f"output={back}"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["vision=dinov2_vits14"], r"vision.name=vit_small_patch14_dinov2.lvd142m: the original's"),
        (
            ["text=minilm"],
            "text.name=sentence-transformers/all-MiniLM-L6-v2: the original's layout",
        ),
    ],
)
def test_what_the_layout_cannot_hold(
    dinov2: ByHand,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    write_repository(tmp_path / "m", dinov2.tensors(), DINOV2)
    arguments = [f"input={tmp_path / 'm'}", f"output={tmp_path / 'out'}", *overrides]
    assert said in fails(capsys, "convert", "weights", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"hidden_layers": 2}, "ψ of two layers only"), ({"activation": "relu"}, "activation tanh")],
)
def test_projections_that_the_layout_cannot_hold(
    dinov2: ByHand,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, Any],
    said: str,
) -> None:
    folder = write_repository(tmp_path / "m", dinov2.tensors(), DINOV2)
    repository = original.find_original(folder)
    assert repository is not None
    save_projection(
        ProjectionLayer(16, 32, **arguments), tmp_path / "a.safetensors", repository.specs()
    )
    words = (f"input={tmp_path / 'a.safetensors'}", f"output={tmp_path / 'out'}")
    assert said in fails(capsys, "convert", "weights", *words)
    assert not (tmp_path / "out").exists()


def test_training_on_features_of_its_encoders(dinov2: ByHand, tmp_path: Path) -> None:
    """Extraction, training, and the trained model: every file names the encoders' weights."""
    weights = write_repository(tmp_path / "m", dinov2.tensors(), DINOV2)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        picture(60 + number).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"picture number {number}")
    vision = ("vision=timm", "vision.name=tiny_reg4_dinov2", f"vision.weights={weights}")
    text = ("text=clip_vitb16", "text.name=tiny-clip", f"text.weights={weights}")
    store = f"store={tmp_path / 'store'}"
    source = ("source=folder", f"source.images={photos}", "num_workers=0", "accelerator=cpu")
    run("extract", *source, *vision, "vision.image_size=56", *text, store)
    short = ("trainer=cpu", "trainer.max_epochs=1", "data.batch_size=2", "data.num_workers=0")
    widths = ("projection.text_dim=16", "projection.vision_dim=32", "data.val_fraction=0.5")
    run(
        "train",
        "experiment=vitb_infonce",
        store,
        *short,
        *widths,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    model = Talk2DINO.from_pretrained(tmp_path / "run", "cpu")
    assert model.vision.spec["weights"] == str(weights)
    embedding = model.text.encode(TEXTS)
    torch.testing.assert_close(embedding, dinov2.clip.encode_text(dinov2.tokenizer(TEXTS)).data)
    pixels = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(model.vision(pixels).patch_tokens, dinov2.image(pixels)[0])
