"""A search with Optuna: the study in the sweep folder, its space, and the end of bad runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from talk2dino.errors import ConfigError
from talk2dino.files import write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

STUDY = "sweep"  # the study's name in its storage
PRUNED = "pruned.json"  # in the run folder of a trial that was stopped
RANGE_KEYS = ("low", "high", "step", "log")


def open_study(
    storage: str, mode: str, sampler: BaseSampler | None, pruner: BasePruner | None
) -> Study:
    """Open the study of a storage, or create it.

    Args:
        storage: URL, `sqlite:////path/optuna.db` or of another database.
        mode: max or min.
        sampler: proposes values; None is Optuna's default.
        pruner: stops runs that do worse than others; None stops none.

    Raises:
        ConfigError: the storage cannot be opened, or another mode.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if mode not in ("max", "min"):
        raise ConfigError(f"sweep.mode={mode}: choose max or min")
    try:
        return optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="maximize" if mode == "max" else "minimize",
            sampler=sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy's many, and an unknown URL's ArgumentError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"sweep.storage={storage}: cannot be opened ({reason})") from error


def distributions(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a search space.

    Args:
        space: per config key a list of values, or a range `{low, high}` with `step` or `log: true`;
            whole numbers make a range of whole numbers.

    Raises:
        ConfigError: neither, or a range that is none.
    """
    return {key: _distribution(key, choice) for key, choice in space.items()}


def _distribution(key: str, choice: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(choice, Sequence) and not isinstance(choice, str):
        if not choice:
            raise ConfigError(f"sweep.space.{key}: the list is empty; name the values to try")
        return CategoricalDistribution(list(choice))
    if not isinstance(choice, Mapping):
        raise ConfigError(
            f"sweep.space.{key}={choice!r}: give a list of values, or {{low: …, high: …}} with "
            "log: true or a step"
        )
    unknown = [name for name in choice if name not in RANGE_KEYS]
    low, high, step = choice.get("low"), choice.get("high"), choice.get("step")
    if unknown or not (_is_number(low) and _is_number(high)):
        raise ConfigError(
            f"sweep.space.{key}={dict(choice)}: a range has the numbers low and high, and may have "
            "step or log: true"
        )
    log = choice.get("log", False)
    if not isinstance(log, bool) or not (step is None or (_is_number(step) and step > 0)):
        raise ConfigError(
            f"sweep.space.{key}={dict(choice)}: log is true or false, step a number above 0"
        )
    try:
        if all(isinstance(number, int) for number in (low, high, step or 0)):
            return IntDistribution(low=low, high=high, log=log, step=step or 1)  # type: ignore[arg-type]
        return FloatDistribution(low=low, high=high, log=log, step=step)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"sweep.space.{key}={dict(choice)}: {error}") from error


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def as_override(key: str, value: Any) -> str:
    """A sampled value as a Hydra override.

    Raises:
        ConfigError: a text with characters that an override cannot carry.
    """
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str) and ("'" in value or "\\" in value):
        raise ConfigError(f"sweep.space.{key}: {value!r} holds a quote or a backslash")
    return f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}"


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
