"""Losses and their gradients against the original's, and three steps of training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment import InfoNCE, ProjectionLayer, TripletLoss
from talk2dino.alignment import similarity as sim
from talk2dino.errors import ConfigError
from tests.helpers.goldens import parameters

MATRICES = ["rand5", "cos5", "diag4", "b8", "b1"]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("case", "scale"), [("infonce", 1 / 0.07), ("infonce_ls1.0", math.e)])
def test_infonce_matches_original(golden, parity, name, case, scale) -> None:
    arrays = golden("loss")
    scores = arrays[f"{name}/scores"].requires_grad_()
    criterion = InfoNCE(logit_scale=scale, learnable_logit_scale=True)
    loss = criterion(scores)
    loss.backward()
    for got, key in [
        (loss, "loss"),
        (scores.grad, "grad_scores"),
        (criterion.logit_scale, "logit_scale"),
        (criterion.logit_scale.grad, "grad_logit_scale"),
    ]:
        want = arrays[f"{name}/{case}/{key}"]
        parity.check("InfoNCE", "Contrastive.compute_contrastive_loss", got, want, 2e-7)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("margin", [0.2, 0.0])
@pytest.mark.parametrize("hardest", [True, False])
def test_triplet_matches_original(golden, parity, name, margin, hardest) -> None:
    arrays = golden("loss")
    scores = arrays[f"{name}/scores"].requires_grad_()
    loss = TripletLoss(margin=margin, max_violation=hardest)(scores)
    loss.backward()
    case = f"{name}/triplet_mv{int(hardest)}_margin{margin}"
    original = "Contrastive.compute_contrastive_loss"
    parity.check("triplet loss", original, loss, arrays[f"{case}/loss"], 2e-7)
    parity.check("triplet loss", original, scores.grad, arrays[f"{case}/grad_scores"], 2e-7)


def psi_of(arrays: dict[str, Tensor]) -> ProjectionLayer:
    psi = ProjectionLayer(16, 32)
    psi.load_state_dict(parameters(arrays, "e2e/"))
    return psi


@pytest.mark.parametrize(
    ("case", "criterion"),
    [
        ("infonce", InfoNCE()),
        ("triplet_mv1", TripletLoss(max_violation=True)),
        ("triplet_mv0", TripletLoss(max_violation=False)),
    ],
)
def test_text_to_loss_matches_original(golden, parity, case, criterion) -> None:
    arrays = golden("loss")
    psi = psi_of(arrays)
    text, heads = psi(arrays["e2e/text"]), arrays["e2e/vis_heads"]
    scores = sim.MaxScore()(text, heads)
    loss = criterion(scores)
    loss.backward()
    part, original = "text to loss, max_score", "ContrastiveLoss.forward"
    parity.check(part, original, scores, arrays[f"e2e/{case}/sims"], 1e-6)
    parity.check(part, original, loss, arrays[f"e2e/{case}/loss"], 2e-7)
    assert torch.equal(sim.head_choice(text, heads), arrays[f"e2e/{case}/index"])
    for name, parameter in psi.named_parameters():
        want = arrays[f"e2e/{case}/grad/{name}"]
        parity.check(f"{part}, gradient", original, parameter.grad, want, 2e-7)


def test_three_adam_steps_match_original(golden, parity) -> None:
    arrays = golden("loss")
    psi, criterion, similarity = psi_of(arrays), InfoNCE(), sim.MaxScore()
    optimizer = torch.optim.Adam(psi.parameters(), lr=float(arrays["e2e/adam3/lr"]))
    losses = []
    for _ in range(3):
        loss = criterion(similarity(psi(arrays["e2e/text"]), arrays["e2e/vis_heads"]))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    part, original = "three Adam steps", "do_train"
    parity.check(part, original, torch.stack(losses), arrays["e2e/adam3/losses"], 2e-7)
    for name, parameter in psi.named_parameters():
        parity.check(part, original, parameter, arrays[f"e2e/adam3/param/{name}"], 1e-6)


def test_without_the_divisor_it_is_the_mean_cross_entropy() -> None:
    scores = torch.randn(6, 6)
    labels = torch.arange(6)
    want = (F.cross_entropy(scores / 0.07, labels) + F.cross_entropy(scores.T / 0.07, labels)) / 2
    plain = InfoNCE(normalize_by_batch_squared=False)(scores)
    torch.testing.assert_close(plain, want)
    torch.testing.assert_close(InfoNCE()(scores) * 36, want)
    torch.testing.assert_close(InfoNCE()(scores.T), InfoNCE()(scores))


def test_same_image_pairs_are_no_negatives() -> None:
    criterion = InfoNCE(mask_same_image=True)
    scores = torch.randn(4, 4).requires_grad_()
    loss = criterion(scores, torch.tensor([7, 3, 7, 5]))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
    assert scores.grad[0, 2] == scores.grad[2, 0] == 0
    assert (scores.grad.count_nonzero()) == 14
    with torch.no_grad():
        scores[0, 2] = 50.0  # would dominate the loss if it were a negative
    torch.testing.assert_close(criterion(scores, torch.tensor([7, 3, 7, 5])), loss)
    distinct = torch.arange(4)
    torch.testing.assert_close(criterion(scores, distinct), InfoNCE()(scores))


def test_only_a_learnable_scale_is_a_parameter() -> None:
    assert not list(InfoNCE().parameters()) and not InfoNCE().state_dict()
    learnable = InfoNCE(learnable_logit_scale=True)
    assert list(learnable.state_dict()) == ["logit_scale"]
    assert math.isclose(learnable.logit_scale.item(), 2.6592, abs_tol=1e-4)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\(3, 4\)"):
        InfoNCE()(torch.randn(3, 4))
    with pytest.raises(ConfigError, match=r"\(3,\)"):
        TripletLoss()(torch.randn(3))
    with pytest.raises(ConfigError, match="no image ids"):
        InfoNCE(mask_same_image=True)(torch.randn(3, 3))
    with pytest.raises(ConfigError, match=r"\(2,\).*\(3, 3\)"):
        InfoNCE(mask_same_image=True)(torch.randn(3, 3), torch.arange(2))
    with pytest.raises(ConfigError, match="logit_scale is 0"):
        InfoNCE(logit_scale=0)
