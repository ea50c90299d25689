"""Cosines between patches in half precision and texts, compiled for the CPU with Numba.

A patch is converted, measured and compared while it lies in the first-level cache, so the store is
read once and nothing of its size is written. Of Q texts a value of two bytes takes 2 Q + 2
floating-point operations: for few texts memory sets the floor, for many the multiply-adds.

Import this module only where it is needed: it imports Numba. The first call compiles; the code is
kept in `__pycache__` or the user's cache, where one of them can be written.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from talk2dino.segmentation.refinement.pamr_numba import compiled

ZERO, ONE, EPS = (np.float32(number) for number in (0, 1, 1e-6))
AT_ONCE = 4  # texts that share the conversion of a value


@intrinsic  # type: ignore[untyped-decorator]
def _half(_: Any, bits: Any) -> Any:
    """The float32 of a float16 given by its bits; Numba knows no such number on the CPU."""

    def generate(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@partial(compiled, reorder=True)
def _compare(tokens: Any, text: Any, cosines: Any, first: int, last: int) -> None:
    """Images `first..last` of `[I, P, D]` uint16 with `[Q, D]`: `[Q, I, P]`."""
    _, patches, width = tokens.shape
    grouped = len(text) - len(text) % AT_ONCE
    row = np.empty(width, np.float32)
    for i in range(first, last):
        for p in range(patches):
            squares = ZERO
            bits = tokens[i, p]
            for d in range(width):
                value = _half(bits[d])
                row[d] = value
                squares += value * value
            scale = ONE / max(np.sqrt(squares), EPS)
            if not np.isfinite(squares):
                scale = squares - squares  # not a number, which `max` would hide
            for q in range(0, grouped, AT_ONCE):
                one, two, three, four = text[q], text[q + 1], text[q + 2], text[q + 3]
                a, b, c, e = ZERO, ZERO, ZERO, ZERO
                for d in range(width):
                    value = row[d]
                    a += value * one[d]
                    b += value * two[d]
                    c += value * three[d]
                    e += value * four[d]
                cosines[q, i, p] = a * scale
                cosines[q + 1, i, p] = b * scale
                cosines[q + 2, i, p] = c * scale
                cosines[q + 3, i, p] = e * scale
            for q in range(grouped, len(text)):
                one, a = text[q], ZERO
                for d in range(width):
                    a += row[d] * one[d]
                cosines[q, i, p] = a * scale


def cosines(tokens: NDArray[np.float16], text: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of unit texts `[Q, D]` and patches `[I, P, D]`: `[Q, I, P]`.

    As many threads as PyTorch takes share the images. A patch with a value that is not finite has
    cosines that are not.
    """
    images = len(tokens)
    out = np.empty((len(text), *tokens.shape[:2]), np.float32)
    bits = tokens.view(np.uint16)
    threads = min(torch.get_num_threads(), images)
    edges = [images * n // threads for n in range(threads + 1)]
    if threads == 1:
        _compare(bits, text, out, 0, images)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(_compare, bits, text, out), edges[:-1], edges[1:]))
    return out
