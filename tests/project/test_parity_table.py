"""How parity with the original is recorded; the session itself compares docs/parity.md."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.parity import ParityRecord, differs, stable_columns


def test_a_table_keeps_its_columns() -> None:
    record = ParityRecord()
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2), 1e-6)
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2) + 1e-3, 1e-2)
    text = record.table()
    assert stable_columns(text) == [("loss", "`src/loss.py`", "2", "1e-02")]
    assert "1.0e-03" in text
    with pytest.raises(AssertionError, match="loss: deviates by 1 > 1e-06"):
        record.check("loss", "src/loss.py", torch.ones(2), torch.zeros(2), 1e-6)


def test_records_of_several_processes_add_up() -> None:
    one, other, both = ParityRecord(), ParityRecord(), ParityRecord()
    one.check("loss", "src/loss.py", torch.ones(2), torch.ones(2), 1e-6)
    other.check("loss", "src/loss.py", torch.ones(2), torch.ones(2) + 1e-3, 1e-2)
    both.add(one.to_plain())
    both.add(other.to_plain())
    assert stable_columns(both.table()) == [("loss", "`src/loss.py`", "2", "1e-02")]
    assert "1.0e-03" in both.table()


def test_a_stale_page_is_noticed() -> None:
    record = ParityRecord()
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2), 1e-6)
    page = record.table()
    assert differs(page, page) == ""
    record.check("loss", "src/loss.py", torch.ones(2), torch.ones(2), 1e-6)
    assert "src/loss.py" in differs(page, record.table())
    assert differs(page.replace("by hand", "by foot"), page) == "its text is another"
