"""A search with Optuna 4 or later as a Hydra sweeper (`sweep=optuna`).

Hydra imports every plugin at every start, also of other programs, so that nothing large is imported
at the top.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
)
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from talk2dino.errors import ConfigError, require_extra
from talk2dino.files import write_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial


INTERRUPTED = "interrupted"  # user attribute of a trial whose search was killed


class OptunaSweeper(Sweeper):
    """Runs trials until the study of the sweep folder has `sweep.n_trials`; see docs/sweeps.md.

    All settings stand in the config's node `sweep`. A run is told its trial by the overrides
    `sweep.trial` and `sweep.storage`, and reports to the study itself; what came out is read from
    its folder. So any launcher works, and a stopped search goes on with the same sweep folder.
    """

    def __init__(self) -> None:
        self.launcher: Launcher | None = None
        self.parser: OverridesParser | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take the config, and make the parser of overrides and the launcher."""
        self.config = config
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search, then write `best.yaml`."""
        from talk2dino.sweeps.study import distributions, open_study

        require_extra("sweep", "sweep=optuna")
        assert self.parser is not None and self.config is not None
        node, folder = self.config.sweep, Path(self.config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        fixed, space = split(self.parser.parse_overrides(arguments))
        in_config: Any = OmegaConf.to_container(node.space, resolve=True) if node.space else {}
        typed = {line.partition("=")[0].lstrip("+") for line in fixed}
        found = flat(in_config)
        for key in sorted(typed & found.keys()):
            print(f"{key}: has a value on the command line, so sweep.space does not search it")
        searched = {key: choice for key, choice in found.items() if key not in typed}
        ranges = distributions({**searched, **space})
        if not ranges:
            raise ConfigError("sweep.space: nothing to search; see docs/sweeps.md")
        storage = node.storage or f"sqlite:///{folder / 'optuna.db'}"
        fixed.append(f"sweep.storage='{storage}'")
        sampler, pruner = (node[key] and instantiate(node[key]) for key in ("sampler", "pruner"))
        study = open_study(storage, node.mode, sampler, pruner)
        again(study)
        while (left := node.n_trials - tried(study)) > 0:
            self.batch(study, [study.ask(ranges) for _ in range(min(left, node.parallel))], fixed)
        write_best(study, folder, fixed)

    def batch(self, study: Study, trials: Sequence[Trial], fixed: list[str]) -> None:
        """Launch trials together, and tell the study what came out of each."""
        from optuna.trial import TrialState

        from talk2dino.sweeps.study import as_override
        from talk2dino.sweeps.table import read_sweep_run

        assert self.launcher is not None and self.config is not None
        folder, metric = Path(self.config.hydra.sweep.dir).absolute(), self.config.sweep.metric
        jobs = [
            [
                *fixed,
                *(as_override(k, v) for k, v in t.params.items()),
                f"sweep.trial={t._trial_id}",
            ]
            for t in trials
        ]
        try:
            self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        except Exception as error:  # a job's process was killed: its run has no figures
            print(f"error: the launcher lost a job ({error})", file=sys.stderr)
        for trial in trials:
            run = read_sweep_run(folder, folder / str(trial.number), metric)
            if run.state == "pruned":
                study.tell(trial.number, state=TrialState.PRUNED)
            elif run.state == "ok" and run.value is not None:
                study.tell(trial.number, run.value)
            else:
                study.tell(trial.number, state=TrialState.FAIL)


def split(overrides: Sequence[Override]) -> tuple[list[str], dict[str, Any]]:
    """Fixed overrides as text, and the space of the others: a,b choice() range() interval()."""
    fixed: list[str] = []
    space: dict[str, Any] = {}
    for override in overrides:
        if override.is_sweep_override():
            space[override.get_key_element().lstrip("+")] = _choices(override)
        else:
            fixed.append(str(override.input_line))
    return fixed, space


def _choices(override: Override) -> Any:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return {"low": value.start, "high": value.end, "log": "log" in value.tags}
    if isinstance(value, RangeSweep):
        return [_plain(item) for item in value.range()]
    if isinstance(value, ChoiceSweep):
        return [_plain(item) for item in value.list]
    raise ConfigError(f"{override.input_line}: a search knows a,b choice() range() interval()")


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def flat(space: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys of a nested space; a node with `low` and `high` is a range."""
    found: dict[str, Any] = {}
    for key, value in space.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and not {"low", "high"} & set(value):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def again(study: Study) -> None:
    """Trials that a killed search left running do not count and are tried once more."""
    from optuna.trial import Trial, TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        Trial(study, trial._trial_id).set_user_attr(INTERRUPTED, True)
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def tried(study: Study) -> int:
    """Trials that came to an end, failed ones included."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state.is_finished() and INTERRUPTED not in t.user_attrs for t in trials)


def write_best(study: Study, folder: Path, fixed: list[str]) -> None:
    """Write the best trial's values as `best.yaml`; its first line is a command line."""
    from optuna.trial import TrialState

    from talk2dino.sweeps.study import as_override

    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return
    best = study.best_trial
    found = [as_override(key, value) for key, value in best.params.items()]
    kept = [item for item in fixed if not item.startswith("sweep")]
    lines = [
        f"# {shlex.join([*kept, *found])}",
        f"# run {best.number}: {best.value:.6g}",
        OmegaConf.to_yaml(OmegaConf.create(best.params)),
    ]
    write_text(folder / "best.yaml", "\n".join(lines))


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="talk2dino_optuna",
    node={"_target_": f"{__name__}.{OptunaSweeper.__name__}"},
    provider="talk2dino",
)
