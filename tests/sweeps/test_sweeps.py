"""Sweeps: failed jobs do not end them, searches prune and continue, tables tell what came out."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from talk2dino.config.checks import explain
from talk2dino.errors import ConfigError
from talk2dino.sweeps.study import as_override, distributions
from talk2dino.sweeps.table import (
    SweepRun,
    _short,
    draw_sweep,
    ordered,
    read_sweep_run,
    read_sweep_runs,
    table,
    varied,
)
from tests.helpers.pipeline import TRAIN, fails, need, run
from tests.helpers.stores import tiny_store

METRIC = "val/text_to_image/recall@1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images whose captions say something about them."""
    fields = {"disentangled_self_attn": (2, 6), "avg_self_attn_out": (6,)}
    folder = tmp_path_factory.mktemp("store")
    return tiny_store(folder, fields, images=40, learnable=True, dtype="float32")


def sweep(store: Path, folder: Path, *overrides: str) -> int:
    """`train -m` on the tiny store; its exit status."""
    try:
        run(
            "train",
            "-m",
            "experiment=vits_infonce",
            "projection.text_dim=4",
            "projection.vision_dim=6",
            f"store={store}",
            "data.batch_size=8",
            "data.val_fraction=0.4",
            *TRAIN,
            f"hydra.sweep.dir={folder}",
            *overrides,
        )
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_failed_jobs_do_not_end_a_sweep(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = "optimizer.lr=abc,1e-3,1e-2"
    assert sweep(store, tmp_path, "trainer.max_epochs=1", values) == 1
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert errors == ["error: run 0: optimizer.lr='abc' is str, expected float or Tensor"]
    assert "1 failed" in err
    failed = json.loads((tmp_path / "0" / "failed.json").read_text())
    assert failed == {"error": "optimizer.lr='abc' is str, expected float or Tensor"}
    assert all((tmp_path / name / "projection.safetensors").is_file() for name in "12")
    assert "failed" in out and str(tmp_path / "sweep.md") in out.replace("\n", "")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "optimizer.lr", METRIC, "seconds", "state", "error"]
    assert [row["state"] for row in rows] == ["ok", "ok", "failed"]
    assert float(rows[0][METRIC]) >= float(rows[1][METRIC])
    assert rows[2]["optimizer.lr"] == "abc"
    assert (tmp_path / "sweep.md").read_text().count("\n") == 5
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # The same folder again, mended: nothing of the old failure stays.
    assert sweep(store, tmp_path, "trainer.max_epochs=1", "optimizer.lr=1e-3,1e-3,1e-2") == 0
    assert not list(tmp_path.rglob("failed.json"))


def test_a_bug_is_noted_with_its_traceback(
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr("talk2dino.features.FeatureStore.__init__", broken)
    assert sweep(store, tmp_path, "seed=0,1") == 1
    err = capfd.readouterr().err
    assert "error: run 1: RuntimeError: a bug in two lines" in err and "Traceback" not in err
    assert "Traceback" in json.loads((tmp_path / "1" / "failed.json").read_text())["traceback"]


@pytest.mark.slow
def test_joblib_runs_jobs_in_processes(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need("joblib", "hydra_plugins.hydra_joblib_launcher")
    one = ("trainer.max_epochs=1", "launcher=joblib", "optimizer.lr=1e-3,abc")
    one += ("hydra.launcher.batch_size=2",)  # both in one process: it takes seconds to import
    assert sweep(store, tmp_path, *one) == 1
    assert [r.state for r in read_sweep_runs(tmp_path, METRIC)] == ["ok", "failed"]
    assert (tmp_path / "sweep.md").is_file()


def search(store: Path, folder: Path, trials: int, *overrides: str) -> int:
    need("optuna")
    return sweep(store, folder, "sweep=optuna", f"sweep.n_trials={trials}", *overrides)


def test_a_search_ends_with_best_values_and_goes_on(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """YAML and command line both name the space; a killed trial is tried again."""
    import optuna

    one = ("trainer.max_epochs=1", "projection.hidden_layers=1,2", "seed=range(0,2)")
    assert search(store, tmp_path, 2, *one) == 0
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.load_study(study_name="sweep", storage=url)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2
    killed = study.ask(study.trials[0].distributions)  # as a killed search leaves it
    assert search(store, tmp_path, 3, *one) == 0
    study = optuna.load_study(study_name="sweep", storage=url)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2 + ["FAIL", "COMPLETE"]
    assert study.trials[3].params == killed.params
    runs = read_sweep_runs(tmp_path, METRIC)
    assert [run.name for run in runs] == ["0", "1", "3"]
    assert [run.value for run in runs] == [t.value for t in study.trials if t.value is not None]
    best = OmegaConf.load(tmp_path / "best.yaml")
    assert dict(best) == study.best_trial.params
    assert set(best) == {"optimizer.lr", "projection.hidden_layers", "seed"}
    line = (tmp_path / "best.yaml").read_text().splitlines()[0]
    assert f"optimizer.lr={best['optimizer.lr']}" in line and "sweep" not in line
    assert set(varied(runs)) <= {"optimizer.lr", "projection.hidden_layers", "seed"}


def test_the_pruner_stops_runs(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A threshold that no run reaches stops each after its first validation."""
    status = search(
        store,
        tmp_path,
        2,
        "~sweep.pruner.n_startup_trials",
        "sweep.pruner.n_warmup_steps=0",
        "sweep.pruner._target_=optuna.pruners.ThresholdPruner",
        "+sweep.pruner.lower=1000.0",
        "trainer.max_epochs=3",
    )
    assert status == 0
    for name in "01":
        folder = tmp_path / name
        assert json.loads((folder / "pruned.json").read_text())["epoch"] == 0
        assert json.loads((folder / "metrics.json").read_text())["steps"] == 3
        assert (folder / "projection.safetensors").is_file()
    assert "pruned after" in capfd.readouterr().out
    assert [run.state for run in read_sweep_runs(tmp_path, METRIC)] == ["pruned", "pruned"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sweep.space={optimizer.lr: {low: 1}}"], "sweep.space.optimizer.lr"),
        (["sweep.space={optimizer.lr: 3}"], "sweep.space.optimizer.lr=3"),
        (["sweep.space={optimizer.lr: {low: 2, high: 1}}"], "sweep.space.optimizer.lr"),
        (["sweep.mode=up"], "sweep.mode=up: choose max or min"),
        (["sweep.storage=nowhere"], "sweep.storage=nowhere: cannot be opened"),
        (["sweep.n_trials=many"], "sweep.n_trials=many"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_search_is_one_line(
    overrides: list[str],
    named: str,
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    need("optuna")
    line = fails(
        capfd,
        "train",
        "-m",
        "sweep=optuna",
        f"store={store}",
        f"hydra.sweep.dir={tmp_path}",
        *overrides,
    )
    assert named in line


def test_a_value_on_the_command_line_is_not_searched(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`sweep.space` holds the learning rate: what was typed wins, and that is said."""
    need("optuna")
    given = ("trainer.max_epochs=1", "optimizer.lr=3e-3", "seed=1,2")
    assert search(store, tmp_path, 1, *given) == 0
    assert "optimizer.lr: has a value on the command line" in capfd.readouterr().out
    (found,) = read_sweep_runs(tmp_path, METRIC)
    assert found.overrides["optimizer.lr"] == "3e-3" and found.overrides["seed"] in "12"


def test_the_search_space() -> None:
    need("optuna")
    found = distributions(
        {
            "a": [1, None, "x", False],
            "b": {"low": 1, "high": 4},
            "c": {"low": 1e-5, "high": 1, "log": True},
            "d": {"low": 0.0, "high": 1.0, "step": 0.25},
        }
    )
    shown = {key: str(value) for key, value in found.items()}
    assert shown["a"] == "CategoricalDistribution(choices=(1, None, 'x', False))"
    assert shown["b"].startswith("IntDistribution(high=4, log=False, low=1")
    assert shown["c"].startswith("FloatDistribution(high=1.0, log=True, low=1e-05")
    assert "step=0.25" in shown["d"]
    one = {"low": 1, "high": 9}
    odd = [one | {"log": "no"}, one | {"log": 0}, one | {"step": 0}, one | {"step": "1"}]
    for wrong in (
        *({"low": 0, "high": "b"}, {"low": 0.0, "high": 1.0, "log": True}, [], "text"),
        *odd,
    ):
        with pytest.raises(ConfigError, match=r"sweep\.space\.k"):
            distributions({"k": wrong})
    assert as_override("k", None) == "k=null"
    assert as_override("k", True) == "k=true"
    assert as_override("k", 1e-05) == "k=1e-05"
    for text in ("a b", "2024_05_06", "null", "1e3", "é"):
        assert as_override("k", text) == f"k='{text}'"


def test_numbers_of_the_table_are_told_apart() -> None:
    whole = ["100001", "100002", "12345", "2024_01", "-7", "1e", "cat", "nan", "None"]
    assert [_short(cell) for cell in (*whole, 12345)] == [*whole, "12345"]
    fractions = {"0.123456": "0.1235", "1e-05": "1e-05", 12345.6: "12346", ".5": "0.5", 3.0: "3"}
    assert [_short(cell) for cell in fractions] == list(fractions.values())


def test_a_job_that_never_began_has_no_figure(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    found = read_sweep_run(tmp_path, tmp_path / "0", METRIC)
    assert (found.state, found.value, found.overrides) == ("unfinished", None, {})


def test_processes_that_would_do_the_same_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from talk2dino.config import command

    monkeypatch.setattr(command.HydraConfig, "get", lambda: SimpleNamespace(mode=None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = {"strategy": "auto", "devices": 1, "num_nodes": 1}
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for fine in ({"strategy": "ddp"}, {"devices": 2}):
            command.check_processes(OmegaConf.create({"trainer": alone | fine}))
        with pytest.raises(SystemExit) as stopped:
            command.check_processes(OmegaConf.create({"trainer": alone}))
        assert stopped.value.code == 2
        assert ("2 processes would each" in capfd.readouterr().err) == said
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    command.check_processes(OmegaConf.create({"trainer": alone}))


def test_command_line_syntax_of_a_space() -> None:
    need("optuna")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from hydra_plugins.talk2dino_optuna.sweeper import flat, split

    words = ["seed=3", "a=1,x", "b=tag(log,interval(1,10))", "c=int(interval(1,5))", "d=range(3)"]
    fixed, space = split(OverridesParser.create().parse_overrides(words))
    assert fixed == ["seed=3"]
    assert space == {
        "a": [1, "x"],
        "b": {"low": 1.0, "high": 10.0, "log": True},
        "c": {"low": 1, "high": 5, "log": False},
        "d": [0, 1, 2],
    }
    assert flat({"a": {"b": [1], "c": {"low": 0, "high": 1}}}) == {
        "a.b": [1],
        "a.c": {"low": 0, "high": 1},
    }


def test_what_is_not_installed_is_named() -> None:
    missing = "Could not find 'hydra/launcher/joblib'\n\nAvailable options:\n\tbasic"
    assert "pip install 'talk2dino[sweep]'" in explain(HydraException(missing), "train")


def test_order_and_columns(tmp_path: Path) -> None:
    runs = [
        SweepRun("0", {"a": "1", "s": "x"}, "ok", 2.0, 1.0),
        SweepRun("1", {"a": "2", "s": "x"}, "failed", None, None, "broken"),
        SweepRun("2", {"a": "30", "s": "x"}, "pruned", 9.0, 1.0),
        SweepRun("3", {"s": "x"}, "ok", 3.0, 1.0),
    ]
    assert [run.name for run in ordered(runs, "max")] == ["3", "0", "2", "1"]
    assert [run.name for run in ordered(runs, "min")] == ["0", "3", "2", "1"]
    assert varied(runs) == ["a"]
    columns, rows = table(runs, "m")
    assert columns == ["run", "a", "m", "seconds", "state", "error"]
    assert rows[1] == ["1", "2", "", "", "failed", "broken"]
    assert rows[3][1] == ""
    assert "error" not in table(runs[:1], "m")[0]
    draw_sweep(tmp_path / "a.png", runs, "m")
    draw_sweep(tmp_path / "b.png", [runs[1]], "m")
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_a_common_run_folder_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from talk2dino.config.command import require_common_folder

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train", "store=x"])
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            require_common_folder()
        assert stopped.value.code == 2
        assert ("hydra.run.dir=DIR" in capfd.readouterr().err) == said
    monkeypatch.setattr(sys, "argv", ["train", "hydra.run.dir=x"])
    require_common_folder()
    monkeypatch.setattr(sys, "argv", ["train", "store=x"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in step.items():  # srun of one task within a larger job
        monkeypatch.setenv(name, value)
    require_common_folder()
