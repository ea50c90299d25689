"""What a sweep of evaluations ends with: one table, as Markdown, CSV and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra callback: reads the run folders of a sweep and writes the comparison beside them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; write `summary.md`, `summary.csv` and `report.html`."""
        from talk2dino.compare import report  # Hydra makes the callback before anything else
        from talk2dino.segmentation.runs import read_sweep

        folder = Path(config.hydra.sweep.dir)
        runs = read_sweep(folder)
        if runs:
            report(runs, folder)
