"""An exponential moving average of the trained weights, used for validation and for the result."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

RAW = "raw_state_dict"  # in a checkpoint: the weights that the optimizer goes on with


class AverageWeights(L.Callback):
    """Averages the trainable weights, a <- decay a + (1 - decay) w, after every optimizer step.

    The average starts from the first weights; early on the decay is min(decay, (1 + n) / (10 + n))
    after n steps (the warm-up of TensorFlow's ExponentialMovingAverage), so that a short run is not
    held back by them. Validation sees the average, checkpoints hold it as their `state_dict` (the
    optimizer's own weights lie beside it, so that a resumed run goes on exactly), and it is what
    training leaves behind. Lightning has such a callback since 2.6 only.

    Args:
        decay: share of the average that stays at each step, 0 < decay < 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._steps = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # the optimizer's weights while the average is in use

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start from the first weights, unless a checkpoint has brought an average."""
        if not self._average:
            self._average = _copy(module)
        device = module.device
        self._average = {name: value.to(device) for name, value in self._average.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Update after an optimizer step; accumulated batches before it change nothing."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        for name, weights in _trainable(module).items():
            self._average[name].lerp_(weights, 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate the average."""
        if self._average:
            self._raw = _copy(module)
            _load(module, self._average)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on with the optimizer's weights."""
        _load(module, self._raw)
        self._raw = {}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave the average behind."""
        _load(module, self._average)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The same for a resumed run that was at its end already and has not trained."""
        _load(module, self._average)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps that the average has seen."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of a checkpoint."""
        self._steps = int(state_dict["steps"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average where every reader looks, and the optimizer's weights beside it."""
        checkpoint[RAW] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint["state_dict"] | self._average

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take both out again; a checkpoint of a run without average starts one from its weights.

        Lightning has loaded `state_dict` into the module before it asks the callbacks.
        """
        names = _trainable(module)
        self._average = {name: checkpoint["state_dict"][name].clone() for name in names}
        if RAW in checkpoint:
            module.load_state_dict(checkpoint[RAW])


def _trainable(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _copy(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in _trainable(module).items()}


@torch.no_grad()
def _load(module: L.LightningModule, values: dict[str, Tensor]) -> None:
    for name, weights in _trainable(module).items():
        if name in values:
            weights.copy_(values[name])
