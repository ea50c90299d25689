"""Every similarity strategy against the original's numbers and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talk2dino.alignment import DoubleMLP, ProjectionLayer, VisualProjectionLayer
from talk2dino.alignment import similarity as sim
from talk2dino.alignment.similarity.all_pairs import trim_mask
from talk2dino.alignment.similarity.heads import take_head
from talk2dino.errors import ConfigError
from tests.helpers.goldens import parameters

PAIRED = {"max_score": sim.MaxScore, "weighted_avg": sim.WeightedAverage}
ALL_PAIRS = {
    "sum": sim.SumHeads,
    "mean": sim.MeanHeads,
    "max-row_sum": sim.MaxRowSum,
    "nucleus-sampling": sim.Nucleus,
}
STRATEGIES = PAIRED | ALL_PAIRS
ORIGINAL = "ProjectionLayer.forward"


def text_by_image(strategy: str, matrix: Tensor) -> Tensor:
    """The original's matrix as [text, image]: four strategies return [image, text]."""
    return matrix.T if strategy in ALL_PAIRS else matrix


def psi_of(arrays: dict[str, Tensor]) -> ProjectionLayer:
    psi = ProjectionLayer(16, 32)
    psi.load_state_dict(parameters(arrays, ""))
    return psi


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_matches_original(golden, parity, strategy, cosine) -> None:
    arrays = golden("projection_similarity")
    text = psi_of(arrays)(arrays["in/text"])
    scores = STRATEGIES[strategy](cosine=cosine)(text, arrays["in/vis_heads"])
    want = text_by_image(strategy, arrays[f"heads/cos{int(cosine)}/{strategy}"])
    parity.check(f"similarity {strategy}", ORIGINAL, scores, want, 5e-6)


@pytest.mark.parametrize("cosine", [True, False])
def test_dot_product_matches_original(golden, parity, cosine) -> None:
    arrays = golden("projection_similarity")
    text = psi_of(arrays)(arrays["in/text"])
    got = sim.DotProduct(cosine=cosine)(text, arrays["in/vis"])
    parity.check("similarity", ORIGINAL, got, arrays[f"vis/cos{int(cosine)}/default"], 5e-6)


@pytest.mark.parametrize(("kc", "ke"), [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("strategy", ALL_PAIRS)
def test_token_text_matches_original(golden, parity, strategy, cosine, kc, ke) -> None:
    arrays = golden("projection_similarity")
    text, mask = psi_of(arrays)(arrays["in/text_tokens"]), arrays["in/mask"].bool()
    similarity = ALL_PAIRS[strategy](cosine=cosine, keep_cls=kc, keep_end_seq=ke)
    for kind, visual in (("vis", "in/vis"), ("heads", "in/vis_heads")):
        name = f"{kind}_tokens/cos{int(cosine)}/kc{int(kc)}_ke{int(ke)}/{strategy}"
        got = similarity(text, arrays[visual], mask)
        parity.check(f"similarity {strategy}, tokens", ORIGINAL, got, arrays[name].T, 3e-5)
    assert torch.equal(mask, arrays["in/mask"].bool())
    assert torch.equal(
        trim_mask(mask, kc, ke), arrays[f"mask_after/kc{int(kc)}_ke{int(ke)}"].bool()
    )


def test_gradients_match_original(golden, parity) -> None:
    arrays = golden("projection_grads")
    for kind, strategies in (("heads", STRATEGIES), ("heads_tokens", ALL_PAIRS)):
        for strategy, similarity in strategies.items():
            psi = psi_of(arrays)
            tokens = kind == "heads_tokens"
            text = psi(arrays["in/text_tokens" if tokens else "in/text"])
            mask = arrays["in/mask"].bool() if tokens else None
            scores = similarity()(text, arrays["in/vis_heads"], mask)
            value = (scores * text_by_image(strategy, arrays["in/w"])).sum()
            value.backward()
            part = f"similarity {strategy}, gradient"
            parity.check(part, ORIGINAL, value, arrays[f"{kind}/{strategy}/value"], 3e-5)
            for name, parameter in psi.named_parameters():
                want = arrays[f"{kind}/{strategy}/grad/{name}"]
                parity.check(part, ORIGINAL, parameter.grad, want, 3e-5)


def test_nucleus_alpha_matches_original(golden, parity) -> None:
    arrays = golden("projection_similarity")
    text, mask = psi_of(arrays)(arrays["in/text_tokens"]), arrays["in/mask"].bool()
    for alpha in (0.3, 0.9):
        got = sim.Nucleus(alpha=alpha)(text, arrays["in/vis_heads"], mask)
        want = arrays[f"heads_tokens/cos1/nucleus_alpha{alpha}"].T
        parity.check("similarity nucleus-sampling, alpha", ORIGINAL, got, want, 3e-5)


@pytest.mark.parametrize("cosine", [True, False])
def test_head_choice_and_sampled_head_match_original(golden, parity, cosine) -> None:
    arrays = golden("projection_similarity")
    case = f"heads/cos{int(cosine)}"
    text, heads = psi_of(arrays)(arrays["in/text"]), arrays["in/vis_heads"]
    chosen = sim.head_choice(text, heads, cosine)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, arrays[f"{case}/max_score_index"])
    # Given what was drawn: the generator's sequence belongs to one torch version.
    similarity = sim.SampledHead(cosine=cosine)
    unit = F.normalize(heads, dim=-1) if cosine else heads
    picked = take_head(unit, arrays[f"{case}/sampled_attn_map_index"])
    want = arrays[f"{case}/sampled_attn_map"]
    parity.check(
        "similarity sampled_attn_map", ORIGINAL, similarity.scores(text, picked), want, 2e-5
    )


def test_rectangular_batches_match_original(golden, parity) -> None:
    arrays = golden("projection_similarity")
    text, heads = psi_of(arrays)(arrays["in/text"])[:4], arrays["in/vis_heads"]
    got = sim.DotProduct()(text, arrays["in/vis"])
    parity.check("similarity", ORIGINAL, got, arrays["rect/default_text4_vis5"], 5e-6)
    for name in ("sum", "mean", "max-row_sum"):
        got, want = ALL_PAIRS[name]()(text, heads), arrays[f"rect/{name}_text4_vis5"].T
        parity.check(f"similarity {name}", ORIGINAL, got, want, 5e-6)


@pytest.mark.parametrize("hidden", [True, 2])
def test_double_mlp_similarities_match_original(golden, parity, hidden) -> None:
    arrays = golden("projection_other")
    layer = DoubleMLP(16, 32, hidden)
    layer.load_state_dict(parameters(arrays, f"double/h{hidden}/"))
    heads = layer.project_visual(arrays["in/vis_heads"])
    text, mask = layer.project_text(arrays["in/text"]), arrays["in/mask"].bool()
    tokens = layer.project_text(arrays["in/text_tokens"])
    case = f"double/h{hidden}/tanh"
    for name, kind in STRATEGIES.items():
        want = text_by_image(name, arrays[f"{case}/heads/{name}"])
        parity.check(f"DoubleMLP, {name}", "DoubleMLP.forward", kind()(text, heads), want, 5e-6)
    for name, kind in ALL_PAIRS.items():
        want = arrays[f"{case}/heads_tokens/{name}"].T
        got = kind()(tokens, heads, mask)
        parity.check(f"DoubleMLP, {name}, tokens", "DoubleMLP.forward", got, want, 3e-5)


@pytest.mark.parametrize("weighting", ["static", "conditioned"])
def test_weighted_heads_end_to_end_match_original(golden, parity, weighting) -> None:
    other, single = golden("projection_other"), golden("projection_weighted_heads")
    for arrays, kind, prefix, want in [
        (other, DoubleMLP, f"double/{weighting}/", f"double/{weighting}/forward"),
        (single, ProjectionLayer, f"{weighting}/", f"{weighting}/tanh/forward"),
    ]:
        layer = kind(16, 32, head_weighting=weighting, num_heads=4)
        layer.load_state_dict(parameters(arrays, prefix))
        text = layer.project_text(arrays["in/text"])
        pooled = layer.pool_visual(
            arrays["in/patches"], arrays["in/self_attn_maps"], arrays["in/cls"]
        )
        got = sim.DotProduct()(text, layer.project_visual(pooled))
        original = f"{kind.__name__}.forward"
        parity.check(f"head weighting, {weighting}", original, got, arrays[want], 5e-6)


@pytest.mark.parametrize("hidden", [False, True])
def test_visual_projection_similarity_matches_original(golden, parity, hidden) -> None:
    arrays = golden("projection_other")
    layer = VisualProjectionLayer(16, 32, hidden_dim=24 if hidden else None)
    layer.load_state_dict(parameters(arrays, f"visual/h{hidden}/"))
    text, visual = layer.project_text(arrays["in/text"]), layer.project_visual(arrays["in/vis"])
    for cosine, name in ((True, "forward"), (False, "forward_nocos")):
        want = arrays[f"visual/h{hidden}/tanh/{name}"]
        got = sim.DotProduct(cosine=cosine)(text, visual)
        parity.check("image to text projection", "VisualProjectionLayer.forward", got, want, 5e-6)


# Identities, for every strategy.

ONE_VECTOR = [sim.DotProduct, *PAIRED.values(), sim.SampledHead, *ALL_PAIRS.values()]


def random_batch(seed: int, batch: int, heads: int, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return text, torch.randn(batch, heads, width, generator=generator, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5))
def test_one_head_is_no_choice(seed, batch) -> None:
    text, heads = random_batch(seed, batch, heads=1)
    plain = sim.DotProduct()(text, heads[:, 0])
    for kind in (*ONE_VECTOR[1:], sim.SoftHead):
        torch.testing.assert_close(kind()(text, heads), plain)
        torch.testing.assert_close(kind()(text, heads[:, 0]), plain)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 4))
def test_batches_and_heads_have_no_order(seed, batch, heads) -> None:
    text, visual = random_batch(seed, batch, heads)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    head_order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
    for kind in (*STRATEGIES.values(), sim.SoftHead):
        square = kind()(text, visual)
        torch.testing.assert_close(kind()(text[order], visual[order]), square[order][:, order])
        torch.testing.assert_close(kind()(text, visual[:, head_order]), square)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 5))
def test_scores_of_a_part_are_a_part_of_the_scores(seed, rows, columns) -> None:
    text, visual = random_batch(seed, 5, 3)
    for kind in (*STRATEGIES.values(), sim.SoftHead):
        similarity = kind()
        selected = similarity.select(text, visual)
        part = similarity.scores(text[:rows], selected[:columns])
        torch.testing.assert_close(part, similarity(text, visual)[:rows, :columns])


def test_soft_head_goes_from_the_best_head_to_the_mean() -> None:
    text, heads = random_batch(0, 5, 4)
    torch.testing.assert_close(sim.SoftHead(1e-4)(text, heads), sim.MaxScore()(text, heads))
    mean = F.normalize(heads, dim=-1).mean(dim=1)
    torch.testing.assert_close(sim.SoftHead(1e8)(text, heads), sim.DotProduct()(text, mean))
    heads.requires_grad_()
    sim.SoftHead()(text, heads).sum().backward()
    assert (heads.grad.abs().sum(dim=-1) > 0).all()


def test_sampled_heads_follow_the_softmax_and_the_generator() -> None:
    text, heads = torch.tensor([[3.0, 0.0]]).expand(4000, 2), torch.eye(2).expand(4000, 2, 2)
    similarity = sim.SampledHead(cosine=False, generator=torch.Generator().manual_seed(3))
    first = (similarity.select(text, heads)[:, 0] == 1).float().mean()
    assert abs(first - torch.sigmoid(torch.tensor(3.0))) < 0.02
    again = sim.SampledHead(cosine=False, generator=torch.Generator().manual_seed(3))
    assert (again.select(text, heads)[:, 0] == 1).float().mean() == first


def test_max_row_sum_and_nucleus_equal_a_loop() -> None:
    text, visual, mask = torch.randn(3, 5, 6), torch.randn(4, 2, 6), torch.ones(3, 5).bool()
    mask[1, 3:] = False
    kept = trim_mask(mask, keep_cls=True, keep_end_seq=False)
    units, heads = F.normalize(text, dim=-1), F.normalize(visual, dim=-1)
    for t in range(3):
        for i in range(4):
            best = [
                max(float(units[t, s] @ head) for head in heads[i]) if kept[t, s] else 0.0
                for s in range(5)
            ]
            row = sim.MaxRowSum(keep_cls=True)(text, visual, mask)[t, i]
            assert abs(row - sum(best)) < 1e-5
            ranked = sorted(best, reverse=True)
            shares = [(value - ranked[-1]) / (ranked[0] - ranked[-1]) for value in ranked]
            held, count = 0.0, 0
            while held <= 0.6 * sum(shares):
                held, count = held + shares[count], count + 1
            nucleus = sim.Nucleus(alpha=0.6, keep_cls=True)(text, visual, mask)[t, i]
            assert abs(nucleus - sum(ranked[:count])) < 1e-5


def test_nucleus_beyond_one_keeps_the_best_token_only() -> None:
    text, visual, mask = torch.randn(3, 5, 6), torch.randn(4, 2, 6), torch.ones(3, 5).bool()
    options = {"keep_cls": True, "keep_end_seq": True}
    got = sim.Nucleus(alpha=1.5, **options)(text, visual, mask)
    unit = F.normalize(text, dim=-1).flatten(0, 1)
    alignments = unit @ F.normalize(visual, dim=-1).flatten(0, 1).T
    torch.testing.assert_close(got, alignments.view(3, 5, 4, 2).amax(dim=(1, 3)))


def test_masks_of_one_caption() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    inner = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    before = mask.clone()
    assert torch.equal(trim_mask(mask, keep_cls=False, keep_end_seq=False), inner)
    assert torch.equal(trim_mask(mask, keep_cls=True, keep_end_seq=True), mask)
    assert torch.equal(mask, before)


def test_half_precision_features_are_compared_in_the_texts_dtype() -> None:
    text, visual = torch.randn(3, 6), torch.randn(3, 2, 6).half()
    for kind in (*STRATEGIES.values(), sim.SoftHead):
        got = kind()(text, visual)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, kind()(text, visual.float()))


@pytest.mark.parametrize(
    ("similarity", "text", "visual", "mask", "message"),
    [
        (sim.MaxScore(), (4, 6), (5, 3, 6), None, r"MaxScore pairs .*\(4, 6\).*\(5, 3, 6\)"),
        (sim.MaxScore(), (4, 7, 6), (4, 3, 6), None, "MaxScore compares one vector per caption"),
        (sim.DotProduct(), (4, 6), (4, 6), (4, 6), "with a token mask"),
        (sim.DotProduct(), (4, 6), (4, 8), None, r"\(4, 6\).*\(4, 8\).*vision_dim"),
        (sim.SumHeads(), (4, 6), (4, 3, 6), (4, 7), "SumHeads: .*one vector per caption"),
        (sim.MeanHeads(), (4, 7, 6), (4, 3, 6), None, "MeanHeads: .*found none"),
        (sim.Nucleus(), (4, 7, 6), (4, 3, 6), (4, 5), r"Nucleus: .*\(4, 7\), found \(4, 5\)"),
    ],
)
def test_wrong_shapes_are_named(similarity, text, visual, mask, message) -> None:
    token_mask = None if mask is None else torch.ones(mask).bool()
    with pytest.raises(ConfigError, match=message):
        similarity(torch.randn(text), torch.randn(visual), token_mask)
    with pytest.raises(ConfigError, match="temperature is 0"):
        sim.SoftHead(temperature=0)
