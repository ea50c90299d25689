"""What a part of `benchmarks/gpu.py` reports: rows of figures, and how it measures them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where a part runs: the device's name, and whether at sizes that only show that it runs."""

    device: str
    tiny: bool

    @property
    def at(self) -> torch.device:
        """The device itself."""
        return torch.device(self.device)

    def choose(self, real: T, tiny: T) -> T:
        """One of two sizes."""
        return tiny if self.tiny else real


@dataclass(frozen=True)
class Row:
    """A figure: a check if it has a bound, else a measurement.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: `deviation`, `ms` and so on.
        bound: the largest value that passes.
        beside: what `ratio` compares with.
        ratio: how many times as fast as `beside`.
        note: what else there is to say.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    beside: str = ""
    ratio: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether a check passed (NaN does not); None for a measurement."""
        return None if self.bound is None else self.value <= self.bound


def check(name: str, value: float, bound: float, unit: str = "deviation", note: str = "") -> Row:
    return Row(name, value, unit, bound, note=note)


def deviation(got: Tensor, want: Tensor) -> float:
    """Largest difference, NaN if there is one; infinite for other shapes."""
    if got.shape != want.shape:
        return float("inf")
    return float((got.detach().cpu().double() - want.detach().cpu().double()).abs().max())


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return deviation(got, want) / float(want.detach().abs().max())


def median_ms(action: Callable[[], object], setting: Setting, seconds: float = 1.5) -> float:
    """Median milliseconds of `action` after a call to warm up; of one call if that takes `seconds`.

    On CUDA between events, host work included: the device is idle when the first is recorded.
    """
    if setting.tiny:
        return _once_ms(action, setting.at)
    action()
    times: list[float] = []
    while not times or (len(times) < 50 and sum(times) < 1e3 * seconds):
        times.append(_once_ms(action, setting.at))
    return statistics.median(times)


def _once_ms(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def compare(
    name: str,
    ways: Mapping[str, Callable[[], object]],
    setting: Setting,
    baseline: str,
    per: float = 0,
) -> list[Row]:
    """Time every way; ratios say how many times as fast as `baseline` it is.

    A way that runs out of memory gets a row that says so. `per` items are handled by a call: the
    rows then note items per second.
    """
    found: dict[str, float] = {}
    for way, action in ways.items():
        try:
            found[way] = median_ms(action, setting)
        except torch.cuda.OutOfMemoryError:
            found[way] = float("nan")
            torch.cuda.empty_cache()
    rows = []
    for way, ms in found.items():
        note = "out of memory" if ms != ms else f"{per / ms * 1e3:,.0f}/s" if per else ""
        row = Row(f"{name}: {way}", ms, "ms", note=note)
        ratio = found[baseline] / ms
        if way != baseline and ratio == ratio:
            row = replace(row, beside=baseline, ratio=ratio)
        rows.append(row)
    return rows
