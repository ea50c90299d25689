"""How much memory a computation takes beyond what was there before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that tensors on the CPU grew at any moment of `action`, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: float(event["ts"]))
    held = peak = 0
    for event in memory:
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak
