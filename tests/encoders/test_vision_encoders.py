"""Vision encoders against an eager twin: the same model with the whole attention matrix in view."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from talk2dino.encoders import hub
from talk2dino.encoders.build import build_vision
from talk2dino.encoders.devices import autocast
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, EncoderError

# name, image size, prefix tokens, patch size
FAMILIES = [
    ("test_vit", 64, 1, 16),
    ("deit_tiny_distilled_patch16_224", 64, 2, 16),
    ("vit_small_patch14_dinov2.lvd142m", 56, 1, 14),
    ("vit_small_patch14_reg4_dinov2.lvd142m", 56, 5, 14),
    ("vit_small_patch16_dinov3.lvd1689m", 64, 5, 16),
    ("vit_small_patch16_224.dino", 64, 1, 16),
    ("vit_base_patch16_224.mae", 64, 1, 16),
    ("vit_base_patch16_clip_224.openai", 64, 1, 16),
    ("vit_base_patch16_siglip_224", 64, 0, 16),
    ("eva02_tiny_patch14_224", 56, 1, 14),
    ("beit_base_patch16_224", 64, 1, 16),
    ("vit_srelpos_small_patch16_224", 64, 0, 16),
    ("samvit_base_patch16", 64, 0, 16),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, size: int = 64, **options: object) -> TimmVisionEncoder:
    return TimmVisionEncoder(name, weights="random", image_size=size, **options)  # type: ignore


@cache
def shared(name: str, size: int = 64) -> TimmVisionEncoder:
    """One network for all tests to which its weights do not matter."""
    return make(name, size)


def sharpen(encoder: TimmVisionEncoder) -> TimmVisionEncoder:
    """Fresh weights attend almost evenly and many biases are zero: make every part count."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in encoder.model.blocks[-1].attn.named_parameters():
        spread = 0.08 if name.endswith("weight") and parameter.dim() == 2 else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return encoder


def eager(encoder: TimmVisionEncoder, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention probabilities [B, H, N, N] and last block output without fused calls."""
    seen: dict[str, Tensor] = {}
    for module in encoder.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    block = encoder.model.blocks[-1]
    hooks = [
        block.attn.attn_drop.register_forward_pre_hook(lambda _, a: seen.update(attention=a[0])),
        block.register_forward_hook(lambda _m, _i, out: seen.update(block=out)),
    ]
    with torch.no_grad():
        tokens = encoder.model.forward_features((images - encoder.mean) / encoder.std)
    for hook in hooks:
        hook.remove()
    block.attn.fused_attn = True
    attention = seen["attention"]
    count = attention.shape[-1]
    return tokens, attention.reshape(len(images), -1, count, count), seen["block"]


@pytest.mark.parametrize(("name", "size", "prefix", "patch"), FAMILIES, ids=lambda v: str(v))
def test_tokens_and_attention_are_the_models_own(
    name: str, size: int, prefix: int, patch: int
) -> None:
    encoder = sharpen(shared(name, size))
    images = torch.rand(2, 3, size, size)
    features = encoder(images)
    tokens, attention, block = eager(encoder, images)
    if tokens.dim() == 4:  # SAM
        tokens = block.flatten(1, 2)
    side = size // patch

    assert (encoder.num_prefix_tokens, encoder.patch_size) == (prefix, patch)
    assert features.grid == (side, side)
    assert features.patch_tokens.shape == (2, side * side, encoder.embed_dim)
    assert features.self_attn_maps.shape == (2, encoder.num_heads, side * side)
    assert attention.shape[1] == encoder.num_heads
    torch.testing.assert_close(features.patch_tokens, tokens[:, prefix:], atol=1e-4, rtol=1e-4)
    row = attention[:, :, 0, prefix:]
    wanted = row / row.sum(-1, keepdim=True)
    got = features.self_attn_maps.softmax(-1)
    assert wanted.std(-1).max() > 0.005  # else uniform attention would pass, too
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    if prefix:
        torch.testing.assert_close(features.cls_token, tokens[:, 0], atol=2e-5, rtol=1e-4)
    else:
        assert not features.cls_token.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "share"), [("32", 2e-4), ("bf16", 4e-2), ("16", 8e-3)])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "beit_base_patch16_224"])
def test_gpu_agrees(name: str, precision: str, share: float, gpu: torch.device) -> None:
    """A model with rotary embeddings and one with a bias, to a share of the largest value."""
    images, encoder = torch.rand(2, 3, 64, 64), make(name)
    want = encoder(images)
    exact = torch.backends.cudnn.flags(allow_tf32=precision != "32")
    with exact, autocast(precision, gpu):
        got = encoder.to(gpu)(images.to(gpu))
    for field in ("patch_tokens", "self_attn_maps", "cls_token", "second_last_out"):
        one, other = getattr(got, field), getattr(want, field)
        assert one.device.type == gpu.type
        atol = share * float(other.abs().max())
        torch.testing.assert_close(one.cpu().float(), other, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "eva02_tiny_patch14_224"])
def test_without_rope_the_plain_projections_are_read(name: str) -> None:
    size = 56 if "14" in name else 64
    rotated, plain = make(name, size), make(name, size, rope_in_attention=False)
    images = torch.rand(1, 3, size, size)
    for encoder in (rotated, plain):
        sharpen(encoder)
    model, heads, seen = plain.model, plain.num_heads, {}
    attention = model.blocks[-1].attn
    attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    features = plain(images)
    with torch.no_grad():
        query, key, _ = attention.qkv(seen["x"]).chunk(3, dim=-1)
        if "dinov3" in name:
            assert attention.q_bias is None  # so the layer that the original hooks is all
        else:
            query = query + attention.q_bias
    width = query.shape[-1] // heads
    full = torch.einsum(
        "bnhd,bmhd->bhnm",
        query.unflatten(-1, (heads, width)),
        key.unflatten(-1, (heads, width)),
    )
    wanted = full[:, :, 0, plain.num_prefix_tokens :] * width**-0.5
    torch.testing.assert_close(features.self_attn_maps, wanted, atol=1e-4, rtol=1e-5)
    assert (features.self_attn_maps - rotated(images).self_attn_maps).abs().max() > 0.01
    torch.testing.assert_close(features.patch_tokens, rotated(images).patch_tokens)


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_dinov2", "samvit_base_patch16"])
def test_the_option_changes_nothing_where_no_rope_is(name: str) -> None:
    size = 56 if "14" in name else 64
    images = torch.rand(1, 3, size, size)
    encoder = make(name, size)  # fresh: SAM's position biases are zero then
    maps = []
    for encoder.rope_in_attention in (True, False):
        maps.append(encoder(images).self_attn_maps)
    torch.testing.assert_close(maps[0], maps[1], atol=1e-5, rtol=0)


def test_second_last_out_is_the_cls_token_before_the_last_block() -> None:
    encoder = shared("vit_small_patch14_reg4_dinov2.lvd142m", 56)
    images = torch.rand(2, 3, 56, 56)
    got = encoder(images).second_last_out
    layers = encoder.model.get_intermediate_layers(
        (images - encoder.mean) / encoder.std, n=[10], return_prefix_tokens=True, norm=False
    )
    assert got is not None
    torch.testing.assert_close(got, layers[0][1][:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_dinov2"])
def test_layers_are_joined_after_the_final_norm(name: str) -> None:
    size = 56 if "14" in name else 64
    encoder = make(name, size, layers=[-3, 1])
    images, depth = torch.rand(2, 3, size, size), len(encoder.model.blocks)
    pixels = (images - encoder.mean) / encoder.std
    parts = [
        encoder.model.get_intermediate_layers(
            pixels, n=[index], return_prefix_tokens=True, norm=True
        )
        for index in sorted((depth - 3, 1))
    ]
    got, default = encoder(images), make(name, size)(images)
    want = torch.cat([part[0][0] for part in parts], -1)
    torch.testing.assert_close(got.patch_tokens, want)
    torch.testing.assert_close(got.cls_token, torch.cat([part[0][1][:, 0] for part in parts], -1))
    assert encoder.embed_dim == want.shape[-1]
    for field in ("self_attn_maps", "second_last_out"):
        torch.testing.assert_close(getattr(got, field), getattr(default, field))
    last = build_vision(make(name, size, layers=[-1]).spec)(images)
    torch.testing.assert_close(last.patch_tokens, default.patch_tokens, rtol=0, atol=0)


def test_layers_of_attention_are_what_it_adds() -> None:
    """To a block's input, before the multilayer perceptron; test_vit scales neither."""
    encoder = make("test_vit", 64, layers=["-5.attn", 2, "2.attn"])
    assert encoder.layers == ["1.attn", "2.attn", 2]
    assert build_vision(encoder.spec).layers == encoder.layers
    images, before, after = torch.rand(2, 3, 64, 64), list[Tensor](), list[Tensor]()
    for index in (1, 2):
        block = encoder.model.blocks[index]
        block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        block.norm2.register_forward_pre_hook(lambda _, inputs: after.append(inputs[0]))
    got = encoder(images).patch_tokens
    added = [y - x for x, y in zip(before, after, strict=True)]
    parts = [functional.layer_norm(tokens, [64])[:, 1:] for tokens in added]
    parts.append(make("test_vit", 64, layers=[2])(images).patch_tokens)
    torch.testing.assert_close(got, torch.cat(parts, -1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "layers", [[], [6], [-7], [0, 0], [5, -1], ["5.attn", "-1.attn"], ["6.attn"], ["2.mlp"], ["x"]]
)
def test_layers_that_are_not_there_are_refused(layers: list[int | str]) -> None:
    with pytest.raises(EncoderError, match="different blocks of test_vit from 0 to 5, or from -6"):
        make("test_vit", layers=layers)


def test_layers_need_a_final_norm() -> None:
    with pytest.raises(EncoderError, match="samvit_base_patch16 has no final norm"):
        make("samvit_base_patch16", layers=[0])


def test_mae_tokens_have_passed_the_final_norm() -> None:
    tokens = shared("vit_base_patch16_224.mae")(torch.rand(1, 3, 64, 64)).patch_tokens
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(-1, correction=0), torch.ones(1, 16), atol=1e-3, rtol=0)


def test_each_family_brings_its_own_normalization() -> None:
    clip = shared("vit_base_patch16_clip_224.openai")
    assert clip.mean.flatten().tolist() == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert clip.std.flatten().tolist() == pytest.approx([0.2686, 0.2613, 0.2758], abs=1e-4)
    assert shared("beit_base_patch16_224").mean.flatten().tolist() == [0.5, 0.5, 0.5]
    dino = shared("vit_small_patch16_224.dino").describe()["preprocessing"]
    assert dino["mean"] == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (448, 448), (518, 518), (224, 336), (14, 28)]
)
def test_dinov2_takes_any_multiple_of_its_patch(height: int, width: int) -> None:
    features = shared("vit_small_patch14_dinov2.lvd142m", 224)(torch.rand(1, 3, height, width))
    rows, columns = height // 14, width // 14
    assert features.grid == (rows, columns)
    assert features.patch_tokens.shape == (1, rows * columns, 384)
    assert features.self_attn_maps.shape == (1, 6, rows * columns)


def test_sam_takes_windows_of_other_sizes() -> None:
    features = shared("samvit_base_patch16")(torch.rand(1, 3, 64, 128))
    assert features.grid == (4, 8)
    assert features.self_attn_maps.shape == (1, 12, 32)
    assert features.patch_tokens.shape == (1, 32, 768)


def test_a_fixed_grid_refuses_other_sizes_in_one_line() -> None:
    encoder = shared("beit_base_patch16_224")
    assert encoder.fixed_size
    with pytest.raises(EncoderError, match=r"64x64 pixels only, got 64x128; set vision\.image"):
        encoder(torch.rand(1, 3, 64, 128))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(EncoderError, match=r"image_size=225 .* the nearest is 224"):
        make("test_vit", 225)
    with pytest.raises(EncoderError, match="50x64 pixels do not divide"):
        make("test_vit")(torch.rand(1, 3, 50, 64))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "swin_tiny_patch4_window7_224", "convit_tiny", "cait_xxs24_224", "volo_d1_224"],
)
def test_other_networks_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(EncoderError, match=f"name={name}: .*choose a vision transformer") as caught:
        make(name, 224)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_dlittle_patch16_reg1_gap_256", "xcit_nano_12_p16_224"])
def test_attention_that_is_not_one_softmax_over_tokens_is_refused(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm release does not have {name}")
    with pytest.raises(EncoderError, match="vision transformer"):
        make(name, 224)(torch.rand(1, 3, 224, 224))


def test_an_unknown_name_suggests_a_known_one() -> None:
    with pytest.raises(EncoderError, match="vit_small_patch14_dinov2"):
        make("vit_smal_patch14_dinov2")


def test_attention_is_float32_under_autocast_and_nothing_leaks() -> None:
    encoder = sharpen(make("test_vit"))
    images = torch.rand(2, 3, 64, 64)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(images)
    assert rough.self_attn_maps.dtype == torch.float32
    torch.testing.assert_close(rough.self_attn_maps, exact.self_attn_maps, atol=0.1, rtol=0.05)
    block = encoder.model.blocks[-1]
    assert not block._forward_hooks and not block.attn._forward_pre_hooks
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


def test_random_weights_are_always_the_same_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make("test_vit").describe()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert make("test_vit").describe() == first
    assert first["prefix_tokens"] == 1
    again = build_vision(first["spec"])
    assert again.describe() == first


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_load(tmp_path: Path, suffix: str) -> None:
    source = sharpen(make("test_vit"))
    path = tmp_path / f"weights{suffix}"
    state = source.model.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:  # as publishers do: wrapped, and with a classifier
        torch.save({"model": {**state, "head.weight": torch.ones(3, 64)}}, path)
    loaded = TimmVisionEncoder("test_vit", weights=str(path), image_size=64)
    assert loaded.describe()["weights_sha256"] == source.describe()["weights_sha256"]


def test_local_weights_of_another_resolution_are_resampled(tmp_path: Path) -> None:
    path = tmp_path / "beit.safetensors"
    state = shared("beit_base_patch16_224").model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    larger = TimmVisionEncoder("beit_base_patch16_224", weights=str(path), image_size=96)
    assert larger(torch.rand(1, 3, 96, 96)).grid == (6, 6)


def test_weights_in_the_publishers_naming_load(tmp_path: Path) -> None:
    """Meta's DINOv2 files call the registers otherwise and carry a mask token."""
    source = make("vit_small_patch14_reg4_dinov2", 56)
    state = dict(source.model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    grid = state.pop("pos_embed")  # timm adds it to the patches only
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), grid], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = TimmVisionEncoder(
        "vit_small_patch14_reg4_dinov2", weights=str(tmp_path / "dinov2.pth"), image_size=56
    )
    images = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(loaded(images).patch_tokens, source(images).patch_tokens)


def test_wrong_local_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(content: object, name: str = "bad.pth") -> str:
        torch.save(content, tmp_path / name)
        with pytest.raises(EncoderError) as caught:
            TimmVisionEncoder("test_vit", weights=str(tmp_path / name), image_size=64)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 500 and name in message
        return message

    good = make("test_vit").model.state_dict()
    assert "missing" in refused({"something.weight": torch.ones(2)})
    assert "1 missing (cls_token)" in refused({k: v for k, v in good.items() if k != "cls_token"})
    assert "1 unknown (extra)" in refused({**good, "extra": torch.ones(1)})
    shape = refused({**good, "norm.weight": torch.ones(5)})
    assert "norm.weight (5,) instead of (64,)" in shape
    assert "holds a list" in refused([1, 2])
    assert "not a file of weights" in refused(nn.Linear(2, 2))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(EncoderError, match="not a file of weights"):
        TimmVisionEncoder("test_vit", weights=str(tmp_path / "text.pth"), image_size=64)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(EncoderError, match="not a file of weights"):
        TimmVisionEncoder("test_vit", weights=str(tmp_path / "text.safetensors"), image_size=64)
    with pytest.raises(EncoderError, match="no such file; use hub"):
        TimmVisionEncoder("test_vit", weights=str(tmp_path / "none.pth"), image_size=64)
    with pytest.raises(EncoderError, match="only vit_small_patch14_dinov2 is bundled"):
        TimmVisionEncoder("test_vit", weights="bundled", image_size=64)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a network: nothing answers at the Hub's address, nothing is cached."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_without_a_network_the_message_is_quick_and_clear(unreachable: None) -> None:
    from huggingface_hub import constants

    start = time.monotonic()
    with pytest.raises(EncoderError, match=r"cannot get the weights of test_vit .*FILE") as caught:
        TimmVisionEncoder("test_vit", image_size=64)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file, and the Hub gives no"):
        hub.resolve_checkpoint("nobody/nothing")
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE is False
