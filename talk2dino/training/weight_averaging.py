"""A moving average of the weights in place of the last ones (`ema.decay`)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from talk2dino.errors import ConfigError


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights, a <- d a + (1 - d) w after every optimizer step.

    Lightning's callback validates the average, writes it as the `state_dict` of every checkpoint
    (the optimizer's own weights lie beside it as `current_model_state`) and leaves it in the module
    when training ends. Added here:

    - the average starts from the first weights, and d is min(decay, (1 + n) / (10 + n)) after n
      steps (the warm-up of TensorFlow's ExponentialMovingAverage), so that a short run is not
      dominated by them;
    - the average lies where the weights lie; Lightning makes it before it moves the module;
    - a run that is resumed at its end, and so does not train, ends with the average as well;
    - checkpoints of version 0.1 are read, which name the optimizer's weights `raw_state_dict`.

    Args:
        decay: largest share of the average that stays at each step, 0 < decay < 1.

    Raises:
        ConfigError: the decay is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"ema.decay={decay}: use a value between 0 and 1, or null")
        super().__init__(use_buffers=False, avg_fn=self._moved)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the first weights and count them, so that the first step does not replace them."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged.fill_(1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the module to its device; the count stays on the CPU, where reading it is free."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What `on_train_end` does, also if there was nothing left to train."""
        self.on_train_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the number of the last step; version 0.1 calls it `steps`."""
        super().load_state_dict({"latest_update_step": state_dict.get("steps"), **state_dict})

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the average and the optimizer's weights out of a checkpoint."""
        if "raw_state_dict" in checkpoint:
            steps = checkpoint["callbacks"][self.state_key]["steps"]
            checkpoint["current_model_state"] = checkpoint.pop("raw_state_dict")
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(1 + steps)}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _moved(self, average: Tensor, weights: Tensor, _: Tensor | int) -> Tensor:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        return average.lerp(weights.to(average.dtype), 1 - decay)
