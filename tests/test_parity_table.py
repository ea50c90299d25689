"""docs/parity.md is what the tests measure; this file runs after all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity import ParityRecord, stable_columns

COMMITTED = Path(__file__).parents[1] / "docs" / "parity.md"


def test_the_committed_table_is_what_the_tests_measure(
    recorded: ParityRecord, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    if pytestconfig.getoption("--write-parity"):
        pytest.skip("the table is being written")
    recorded.write(tmp_path / "parity.md")
    fresh = (tmp_path / "parity.md").read_text()
    committed = COMMITTED.read_text()
    assert stable_columns(committed) == stable_columns(fresh), (
        "run pytest --write-parity docs/parity.md"
    )
    assert committed.partition("| part")[0] == fresh.partition("| part")[0]
    assert len(stable_columns(committed)) > 30


def test_a_table_keeps_its_columns(tmp_path: Path) -> None:
    record = ParityRecord()
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2), 1e-6)
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2) + 1e-3, 1e-2)
    record.write(tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert stable_columns(text) == [("loss", "`src/loss.py`", "2", "1e-02")]
    assert "1.0e-03" in text
    with pytest.raises(AssertionError, match="loss: deviates by 1 > 1e-06"):
        record.check("loss", "src/loss.py", torch.ones(2), torch.zeros(2), 1e-6)
