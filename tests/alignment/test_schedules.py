"""Learning rates per step against the original's."""

from __future__ import annotations

import pytest
import torch

from talk2dino.alignment.schedules import constant_with_warmup, cosine_with_warmup
from talk2dino.errors import ConfigError


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)


def rates(scheduler: torch.optim.lr_scheduler.LambdaLR, steps: int = 50) -> torch.Tensor:
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("warmup", [0, 1, 10, 60])
def test_constant_matches_original(golden, parity, warmup) -> None:
    want = golden("lr")[f"const/base0.0001_warmup{warmup}"]
    got = rates(constant_with_warmup(optimizer(), warmup_steps=warmup))
    parity.check("constant schedule", "const_lr", got, want.double(), 1e-11)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 50), (1, 50), (10, 50), (5, 30)])
def test_cosine_matches_original_and_stays_at_zero(golden, parity, warmup, steps) -> None:
    want = golden("lr")[f"cosine/base0.0001_warmup{warmup}_steps{steps}"]
    got = rates(cosine_with_warmup(optimizer(), warmup_steps=warmup, total_steps=steps))
    parity.check("cosine schedule", "cosine_lr", got[:steps], want[:steps].double(), 1e-11)
    assert (got[steps:] == 0).all()


def test_a_resumed_schedule_continues() -> None:
    whole = rates(cosine_with_warmup(optimizer(), 5, total_steps=30), 30)
    first = cosine_with_warmup(optimizer(), 5, total_steps=30)
    rates(first, 12)
    second = cosine_with_warmup(optimizer(), 5, total_steps=30)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert torch.allclose(rates(second, 18), whole[12:])


def test_bad_steps_are_named() -> None:
    with pytest.raises(ConfigError, match="warmup_steps is -1"):
        constant_with_warmup(optimizer(), warmup_steps=-1)
    with pytest.raises(ConfigError, match="warmup_epochs is -1"):
        cosine_with_warmup(optimizer(), warmup_epochs=-1, total_steps=5)
    with pytest.raises(ConfigError, match="total_steps is None"):
        cosine_with_warmup(optimizer(), warmup_steps=5)
    with pytest.raises(ConfigError, match="needs steps_per_epoch"):
        constant_with_warmup(optimizer(), warmup_epochs=1.0)


@pytest.mark.parametrize("factory", [constant_with_warmup, cosine_with_warmup])
def test_epochs_are_steps_by_another_name(factory) -> None:
    steps = rates(factory(optimizer(), warmup_steps=15, total_steps=50))
    epochs = rates(factory(optimizer(), warmup_epochs=1.5, total_steps=50, steps_per_epoch=10.0))
    assert torch.equal(steps, epochs)


def test_a_run_cut_short_only_warms_up() -> None:
    got = rates(cosine_with_warmup(optimizer(), warmup_steps=10, total_steps=5), 5)
    assert torch.allclose(got, 1e-4 * torch.arange(1, 6, dtype=torch.float64) / 10)
