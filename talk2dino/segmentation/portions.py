"""How much of a picture's scores is computed at once, by the nature of the device.

A CPU is fast as long as a few classes and rows stay in its caches. On an accelerator every call
costs some ten microseconds, whatever it does, and memory is fast: there everything goes at once
that a bound on memory allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOGETHER = 48  # classes refined at once; more overflow a CPU's cache, fewer read the weights again
MAPS = 1 << 25  # scores at the size of the picture that compete at once: 134 MB


@dataclass(frozen=True)
class Portions:
    """What is computed at once.

    Attributes:
        strip: scores at the size of the picture, float32, without a refinement.
        classes: classes of such a strip.
        together: maps refined before they compete, also of the largest pictures.
        few: maps that cost less to refine than a round to find out which of them can win.
        in_turn: maps compete one after the other, a few at a time, instead of all in one call.
    """

    strip: int
    classes: int
    together: int
    few: int
    in_turn: bool

    def maps(self, pixels: int) -> int:
        """How many maps of so many pixels are refined before they compete."""
        return self.together if self.in_turn else max(self.together, MAPS // pixels)


# Strips of 4 MB and of 1 GiB.
CACHES = Portions(strip=1 << 20, classes=16, together=TOGETHER, few=16, in_turn=True)
MEMORY = Portions(strip=1 << 28, classes=512, together=TOGETHER, few=TOGETHER, in_turn=False)


def portions(device: torch.device) -> Portions:
    """What suits a device."""
    return CACHES if device.type == "cpu" else MEMORY
