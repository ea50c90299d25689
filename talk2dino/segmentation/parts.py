"""Many things a few at a time."""

from __future__ import annotations

from itertools import pairwise


def equal_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Starts and stops of as few parts as hold at most `most`; sizes differ by one at most."""
    parts = -(-count // most)
    return list(pairwise(count * part // parts for part in range(parts + 1))) if parts else []
