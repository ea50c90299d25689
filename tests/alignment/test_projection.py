"""Projections against the original's numbers, its state dicts, and bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from talk2dino.alignment import DoubleMLP, ProjectionLayer, VisualProjectionLayer
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.errors import ConfigError
from tests.helpers.goldens import parameters

ACTIVATIONS: list[Any] = ["tanh", "relu", "sigmoid", None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [False, True, 2])
def test_psi_matches_original(golden, parity, hidden, activation) -> None:
    arrays = golden("projection_project")
    psi = ProjectionLayer(16, 32, hidden_layers=hidden, activation=activation)
    psi.load_state_dict(parameters(arrays, f"h{hidden}/"))
    case = f"h{hidden}/{activation}"
    assert sum(p.numel() for p in psi.parameters()) == arrays[f"{case}/len"]
    for name in ("text", "text_tokens"):
        parity.check(
            part="projection ψ",
            original="ProjectionLayer.project_clip_txt",
            got=psi(arrays[f"in/{name}"]),
            want=arrays[f"{case}/out_{name}"],
            tolerance=2e-6,
        )


def test_legacy_names_load_and_leave_the_callers_dict_alone(golden, parity) -> None:
    arrays = golden("projection_project")
    state = parameters(arrays, "legacy/")
    before = list(state)
    psi = ProjectionLayer(16, 32)
    result = psi.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state) == before
    parity.check(
        part="projection ψ, legacy names",
        original="ProjectionLayer.load_state_dict",
        got=psi(arrays["in/text"]),
        want=arrays["legacy/out_text"],
        tolerance=2e-6,
    )
    nested = torch.nn.ModuleDict({"projection": ProjectionLayer(16, 32)})
    nested.load_state_dict({f"projection.{key}": value for key, value in state.items()})
    torch.testing.assert_close(nested["projection"](arrays["in/text"]), arrays["legacy/out_text"])


def test_half_precision_text_is_computed_in_single() -> None:
    psi = ProjectionLayer(16, 32)
    text = torch.randn(3, 16).half()
    assert psi(text).dtype == torch.float32
    assert torch.equal(psi(text), psi(text.float()))


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("weighting", ["static", "conditioned"])
def test_weighted_heads_match_original(golden, parity, weighting, activation) -> None:
    arrays = golden("projection_weighted_heads")
    psi = ProjectionLayer(16, 32, 1, activation, head_weighting=weighting, num_heads=4)
    psi.load_state_dict(parameters(arrays, f"{weighting}/"))
    got = psi.pool_visual(arrays["in/patches"], arrays["in/self_attn_maps"], arrays["in/cls"])
    parity.check(
        part=f"head weighting, {weighting}",
        original="ProjectionLayer.get_visual_embed",
        got=got,
        want=arrays[f"{weighting}/{activation}/visual_embed"],
        tolerance=1e-6,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [False, True])
def test_visual_projection_matches_original(golden, parity, hidden, activation) -> None:
    arrays = golden("projection_other")
    layer = VisualProjectionLayer(16, 32, hidden_dim=24 if hidden else None, activation=activation)
    layer.load_state_dict(parameters(arrays, f"visual/h{hidden}/"))
    parity.check(
        part="image to text projection",
        original="VisualProjectionLayer.project_dino",
        got=layer.project_visual(arrays["in/vis"]),
        want=arrays[f"visual/h{hidden}/{activation}/project_dino"],
        tolerance=2e-6,
    )
    text = arrays["in/text"]
    assert layer.project_text(text) is text


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [True, 2])
def test_double_mlp_matches_original(golden, parity, hidden, activation) -> None:
    arrays = golden("projection_other")
    layer = DoubleMLP(16, 32, hidden, activation)
    layer.load_state_dict(parameters(arrays, f"double/h{hidden}/"))
    case = f"double/h{hidden}/{activation}"
    for got, name in [
        (layer.project_text(arrays["in/text"]), "project_clip_txt"),
        (layer.project_visual(arrays["in/vis"]), "project_visual"),
        (layer.project_visual(arrays["in/vis_heads"]), "project_visual_heads"),
    ]:
        parity.check(
            part="DoubleMLP",
            original=f"DoubleMLP.{name.removesuffix('_heads')}",
            got=got,
            want=arrays[f"{case}/{name}"],
            tolerance=2e-6,
        )


def test_double_mlp_without_hidden_layers_is_two_linear_maps() -> None:
    layer = DoubleMLP(16, 32, hidden_layers=0)
    text, visual = torch.randn(3, 16), torch.randn(3, 4, 32)
    assert torch.equal(layer.project_text(text), layer.linear_layer(text))
    assert torch.equal(layer.project_visual(visual), layer.visual_linear(visual))


CLASSES: list[Any] = [ProjectionLayer, DoubleMLP]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("weighting", [None, "static", "conditioned"])
@pytest.mark.parametrize("hidden", [False, True, 3])
def test_hyperparameters_rebuild_the_module(kind, weighting, hidden) -> None:
    layer = kind(6, 8, hidden, "relu", weighting, 4 if weighting else None)
    again = kind(**json.loads(json.dumps(layer.hyperparameters)))
    again.load_state_dict(layer.state_dict())
    text = torch.randn(3, 6)
    assert torch.equal(layer.project_text(text), again.project_text(text))


def test_static_head_weights_start_equal() -> None:
    layer = ProjectionLayer(6, 8, head_weighting="static", num_heads=4)
    patches, maps = torch.randn(2, 5, 8), torch.randn(2, 4, 5)
    attention = (maps.mean(dim=1) / 4).softmax(dim=-1)  # mean of (1/H) x map, as in the original
    want = torch.einsum("bp,bpd->bd", attention, patches) / 5
    torch.testing.assert_close(layer.pool_visual(patches, maps, torch.zeros(2, 8)), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "projection.activation is 'gelu'.*tanh"),
        ({"head_weighting": "learned"}, "projection.head_weighting is 'learned'.*static"),
        ({"head_weighting": "static"}, "projection.num_heads is None"),
        ({"hidden_layers": -1}, "projection.hidden_layers is -1"),
        (
            {"head_weighting": "conditioned", "num_heads": 4, "activation": None},
            "projection.activation is null",
        ),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ProjectionLayer(6, 8, **options)


def test_wrong_widths_are_named() -> None:
    with pytest.raises(ConfigError, match=r"projection.text_dim is 6 .*\(3, 7\).*text_dim=7"):
        ProjectionLayer(6, 8)(torch.randn(3, 7))
    with pytest.raises(ConfigError, match=r"projection.vision_dim is 8 .*\(3, 6\)"):
        DoubleMLP(6, 8).project_visual(torch.randn(3, 6))
    with pytest.raises(ConfigError, match=r"projection.vision_dim is 8 .*\(3, 6\)"):
        VisualProjectionLayer(6, 8)(torch.randn(3, 6))
    layer = ProjectionLayer(6, 8, head_weighting="static", num_heads=4)
    with pytest.raises(ConfigError, match=r"num_heads is 4 .*\(2, 3, 5\).*to 3"):
        layer.pool_visual(torch.randn(2, 5, 8), torch.randn(2, 3, 5), torch.randn(2, 8))
    with pytest.raises(ConfigError, match="head_weighting is null"):
        ProjectionLayer(6, 8).pool_visual(
            torch.ones(2, 5, 8), torch.ones(2, 3, 5), torch.ones(2, 8)
        )


# CLIPLastLayer: the original's needs CLIP's weights, so it is compared with open_clip itself.


@pytest.fixture(scope="module")
def clip_tower() -> Any:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32", force_custom_text=True).text.eval()
    for parameter in tower.parameters():  # biases and norms start at 0 and 1: make them count
        torch.nn.init.normal_(parameter, std=0.1)
    return tower.requires_grad_(False)


def from_tower(tower: Any, vision_dim: int) -> CLIPLastLayer:
    text: Any = SimpleNamespace(tower=tower)
    return CLIPLastLayer.from_text_encoder(text, vision_dim)


def clip_tokens(count: int) -> tuple[Tensor, Tensor]:
    eot = torch.randint(2, 77, (count,))
    tokens = torch.randint(1, 49000, (count, 77))
    tokens[torch.arange(77) > eot[:, None]] = 0
    tokens[torch.arange(count), eot] = 49407
    return tokens, eot


def second_last(tower: Any, tokens: Tensor) -> Tensor:
    x = tower.token_embedding(tokens) + tower.positional_embedding
    for block in tower.transformer.resblocks[:-1]:
        x = block(x, attn_mask=tower.attn_mask)
    return x


def test_clip_last_layer_with_clips_weights_is_psi_of_its_embedding(clip_tower) -> None:
    layer = from_tower(clip_tower, vision_dim=32)
    tokens, eot = clip_tokens(3)
    want = layer.projection(clip_tower(tokens))
    got = layer.project_text(second_last(clip_tower, tokens), eot)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_clip_last_layer_trains_a_copy(clip_tower) -> None:
    before = clip_tower.transformer.resblocks[-1].mlp.c_fc.weight.clone()
    layer = from_tower(clip_tower, vision_dim=32)
    tokens, eot = clip_tokens(2)
    layer(second_last(clip_tower, tokens).half(), eot).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert torch.equal(clip_tower.transformer.resblocks[-1].mlp.c_fc.weight, before)


def test_clip_last_layer_refuses_other_towers_and_inputs(clip_tower) -> None:
    with pytest.raises(ConfigError, match=r"causal text tower.*Linear"):
        from_tower(torch.nn.Linear(2, 2), vision_dim=32)
    layer = CLIPLastLayer(6, 8, width=12, num_text_heads=2)
    with pytest.raises(ConfigError, match="second_last_tokens and eot_index"):
        layer.project_text(torch.randn(2, 6))
    with pytest.raises(ConfigError, match=r"projection.width is 12.*\(2, 5, 10\)"):
        layer(torch.randn(2, 5, 10), torch.tensor([1, 2]))


def test_quick_gelu_is_recognised() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 24,
            "heads": 3,
            "layers": 2,
        },
    }
    model = open_clip.CLIP(**config).eval()
    layer = from_tower(model, vision_dim=8)
    assert layer.hyperparameters["quick_gelu"] is True
    tokens, eot = clip_tokens(4)
    want = layer.projection(model.encode_text(tokens))
    torch.testing.assert_close(layer(second_last(model, tokens), eot), want, atol=1e-5, rtol=1e-4)
