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
    whole = rates(cosine_with_warmup(optimizer(), 5, 30), 30)
    first = cosine_with_warmup(optimizer(), 5, 30)
    rates(first, 12)
    second = cosine_with_warmup(optimizer(), 5, 30)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert torch.allclose(rates(second, 18), whole[12:])


def test_bad_steps_are_named() -> None:
    with pytest.raises(ConfigError, match="warmup_steps is -1"):
        constant_with_warmup(optimizer(), warmup_steps=-1)
    with pytest.raises(ConfigError, match=r"total_steps is None.*warmup_steps=5"):
        cosine_with_warmup(optimizer(), warmup_steps=5)
    with pytest.raises(ConfigError, match="total_steps is 5"):
        cosine_with_warmup(optimizer(), warmup_steps=5, total_steps=5)
