"""The end of a sweep: its runs in one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from talk2dino.sweeps.runs import ordered, read_runs
from talk2dino.sweeps.table import write_tables


class SweepTable(Callback):
    """A Hydra callback: after the last job it writes and prints the runs, the best first."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Read the run folders, whichever launcher filled them."""
        folder, sweep = Path(config.hydra.sweep.dir), config.sweep
        runs = ordered(read_runs(folder, sweep.metric), sweep.mode)
        if not runs:
            return
        Console().print(write_tables(folder, runs, sweep.metric))
        print(f"sweep: {folder / 'sweep.md'}, sweep.csv, sweep.png")
