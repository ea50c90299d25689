"""Finding NaN and infinity quickly: by bit pattern, which is far faster than `isfinite` on float16.

A float is not finite exactly when all exponent bits are one, that is, when its bits without the
sign are at least those of infinity (IEEE 754).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_INFINITY = {2: np.uint16(0x7C00), 4: np.uint32(0x7F800000)}
_WITHOUT_SIGN = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF)}
_BLOCK_BYTES = 1 << 24


def all_finite(array: NDArray[Any]) -> bool:
    """Whether a contiguous float16 or float32 array holds no NaN and no infinity."""
    size = array.itemsize
    bits = array.view(_INFINITY[size].dtype)
    return not bits.size or bool((bits & _WITHOUT_SIGN[size]).max() < _INFINITY[size])


def nonfinite_rows(array: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of rows (first axis) of a contiguous float array that hold NaN or infinity."""
    if not array.size:
        return np.empty(0, dtype=np.int64)
    flat = array.reshape(len(array), -1)
    step = max(1, _BLOCK_BYTES // max(1, flat[:1].nbytes))  # bounds the memory of `bits`
    found: list[int] = []
    for start in range(0, len(flat), step):
        block = flat[start : start + step]
        if not all_finite(block):
            found += (start + np.flatnonzero(~np.isfinite(block).all(axis=1))).tolist()
    return np.array(found, dtype=np.int64)
