"""Stops a run of a search that falls behind: the run reports every validation to the study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from talk2dino.atomic import write_json
from talk2dino.sweeps.study import open_study

PRUNED = "pruned.json"  # in the run folder of a trial that was stopped


class PruneTrial(L.Callback):
    """Reports the metric after every validation and ends training when the pruner says so.

    The study is reached through its storage, so this works in whatever process a launcher starts.
    Only the first rank talks to it. A pruned run leaves all its files, and `pruned.json`.

    Args:
        folder: run folder.
        metric: what is reported.
        mode: max or min.
        storage: URL of the study's storage.
        trial: id of this run's trial there.
        pruner: of the study.
    """

    def __init__(
        self, folder: Path, metric: str, mode: str, storage: str, trial: int, pruner: Any
    ) -> None:
        self.folder, self.metric = folder, metric
        self.mode, self.storage, self.trial_id, self.pruner = mode, storage, trial, pruner
        self.pruned = False
        self._trial: Any = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open the study."""
        (self.folder / PRUNED).unlink(missing_ok=True)
        if trainer.is_global_zero:
            from optuna.trial import Trial

            study = open_study(self.storage, self.mode, None, self.pruner)
            self._trial = Trial(study, self.trial_id)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Report, and stop if this trial is worse than others were at the same epoch."""
        value = trainer.callback_metrics.get(self.metric)
        if trainer.sanity_checking or value is None:
            return
        stop = False
        if self._trial is not None:
            self._trial.report(float(value), step=trainer.current_epoch)
            stop = self._trial.should_prune()
        if trainer.strategy.broadcast(stop):
            self.pruned = trainer.should_stop = True
            if trainer.is_global_zero:
                found = {"epoch": trainer.current_epoch, self.metric: float(value)}
                write_json(self.folder / PRUNED, found)
