"""Cosines between patches in half precision and texts, compiled for the CPU with Numba.

Two patches are converted, measured and compared while they lie in the first-level cache, so the
store is read once and nothing of its size is written. Of Q texts a value of two bytes takes 2 Q + 2
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
AT_ONCE = 4  # texts that are compared with two patches at a time: eight sums in registers


@intrinsic  # type: ignore[untyped-decorator]
def _half(_: Any, bits: Any) -> Any:
    """The float32 of a float16 given by its bits; Numba knows no such number on the CPU."""

    def generate(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@compiled
def _scale(squares: Any) -> Any:
    """1 over the length; not a number, which `max` would hide, if the squares are not finite."""
    return ONE / max(np.sqrt(squares), EPS) if np.isfinite(squares) else squares - squares


@partial(compiled, reorder=True)
def _compare(tokens: Any, text: Any, cosines: Any, first: int, last: int) -> None:
    """Images `first..last` of `[I, P, D]` uint16 with `[Q, D]`: `[Q, I, P]`."""
    _, patches, width = tokens.shape
    grouped = len(text) - len(text) % AT_ONCE
    x, y = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(first, last):
        for p in range(0, patches, 2):
            r = min(p + 1, patches - 1)  # the last of an odd number twice
            left, right = tokens[i, p], tokens[i, r]
            xx, yy = ZERO, ZERO
            for d in range(width):
                v, w = _half(left[d]), _half(right[d])
                x[d], y[d] = v, w
                xx += v * v
                yy += w * w
            k, n = _scale(xx), _scale(yy)
            for q in range(0, grouped, AT_ONCE):
                one, two, three, four = text[q], text[q + 1], text[q + 2], text[q + 3]
                a, b, c, e = ZERO, ZERO, ZERO, ZERO
                f, g, h, j = ZERO, ZERO, ZERO, ZERO
                for d in range(width):
                    v, w = x[d], y[d]
                    a += v * one[d]
                    b += v * two[d]
                    c += v * three[d]
                    e += v * four[d]
                    f += w * one[d]
                    g += w * two[d]
                    h += w * three[d]
                    j += w * four[d]
                cosines[q, i, p], cosines[q, i, r] = a * k, f * n
                cosines[q + 1, i, p], cosines[q + 1, i, r] = b * k, g * n
                cosines[q + 2, i, p], cosines[q + 2, i, r] = c * k, h * n
                cosines[q + 3, i, p], cosines[q + 3, i, r] = e * k, j * n
            for q in range(grouped, len(text)):
                one, a, f = text[q], ZERO, ZERO
                for d in range(width):
                    a += x[d] * one[d]
                    f += y[d] * one[d]
                cosines[q, i, p], cosines[q, i, r] = a * k, f * n


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
