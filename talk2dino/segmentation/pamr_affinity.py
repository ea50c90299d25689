"""The affinity of PAMR compiled for the CPU with Numba, 16 columns at a time.

All that belongs to 16 columns stays in registers over the 48 neighbours, which are looked at twice:
first for the standard deviations, then for the weights. Those wait in the first cache until their
sum is known.
"""

from __future__ import annotations

from math import factorial, log
from typing import Any

import numpy as np

from talk2dino.segmentation.compiled import compiled
from talk2dino.segmentation.pamr_vectors import (
    absolute,
    filled,
    largest,
    load,
    nearest,
    power_of_two,
    root,
    store,
    store_fours,
)

NARROWEST = 16  # columns of a vector

ZERO, ONE = np.float32(0), np.float32(1)
TENTH, TINY = np.float32(0.1), np.float32(1e-8)
FACTOR = np.float32(-1 / (3 * log(2)))  # mean of three channels, exponent for 2 instead of e
SMALLEST = np.float32(-115)  # 2 to it over 48 is still a normal number
POWER = tuple(np.float32(log(2) ** n / factorial(n)) for n in range(7, 0, -1))  # Taylor, |r| <= 1/2


@compiled
def exp2(x: Any) -> Any:
    """2 to the power of x <= 0, within 2 units of the last place; 1 for 0 exactly."""
    x = largest(x, filled(SMALLEST))
    n = nearest(x)
    r = x - n
    p = r * POWER[0] + POWER[1]
    p = p * r + POWER[2]
    p = p * r + POWER[3]
    p = p * r + POWER[4]
    p = p * r + POWER[5]
    p = p * r + POWER[6]
    return (p * r + ONE) * power_of_two(n)


@compiled
def _scale(total: Any, squares: Any, samples: Any) -> Any:
    """What an absolute difference counts for: see `pamr.affinity`."""
    mean = total / samples
    variance = largest(squares - mean * mean * samples, filled(ZERO)) / (samples - ONE)
    return FACTOR / (root(variance) * TENTH + TINY)


@compiled
def affinity(top: int, bottom: int, image: Any, steps: Any, margin: int, result: Any) -> None:
    """Rows `top..bottom` of `[H, Q, N, 4]`; `image` `[3, H, margin + 4 * Q + margin]`, Q >= 4."""
    _, height, row = image.shape
    _, blocks, taps, _ = result.shape
    samples = np.float32(taps // 8 * 9)  # the pixel itself counts once per dilation
    weights = np.empty(16 * taps, np.float32)
    offsets = np.empty(taps, np.int64)
    green, blue = height * row, 2 * height * row
    for y in range(top, bottom):
        for t in range(taps):
            beyond = min(max(y + steps[t, 0], 0), height - 1)
            offsets[t] = (beyond - y) * row + steps[t, 1]
        for column in range(0, 4 * blocks, 16):
            x = min(column, 4 * blocks - 16)  # the last vector may repeat some of the one before
            here = y * row + margin + x
            r, g, b = load(image, here), load(image, here + green), load(image, here + blue)
            total_r = total_g = total_b = squares_r = squares_g = squares_b = filled(ZERO)
            for t in range(taps):
                place = here + offsets[t]
                difference_r = load(image, place) - r
                difference_g = load(image, place + green) - g
                difference_b = load(image, place + blue) - b
                total_r = total_r + difference_r
                total_g = total_g + difference_g
                total_b = total_b + difference_b
                squares_r = squares_r + difference_r * difference_r
                squares_g = squares_g + difference_g * difference_g
                squares_b = squares_b + difference_b * difference_b
            scale_r = _scale(total_r, squares_r, samples)
            scale_g = _scale(total_g, squares_g, samples)
            scale_b = _scale(total_b, squares_b, samples)
            # The best logit of a pixel is at least -32 (a deviation counts the pixel itself), so
            # exp cannot vanish everywhere and the softmax needs no maximum. Rows must sum to 1
            # (an error is multiplied in every iteration), so what rounding loses is kept.
            total = lost = filled(ZERO)
            for t in range(taps):
                place = here + offsets[t]
                logit = absolute(load(image, place) - r) * scale_r
                logit = absolute(load(image, place + green) - g) * scale_g + logit
                logit = absolute(load(image, place + blue) - b) * scale_b + logit
                weight = exp2(logit)
                store(weights, 16 * t, weight)
                before = total
                total = before + weight
                added = total - before
                lost = lost + ((before - (total - added)) + (weight - added))
            share = ONE / (total + lost)
            first = (y * blocks + x // 4) * taps * 4
            for t in range(taps):
                store_fours(result, first + 4 * t, 4 * taps, load(weights, 16 * t) * share)
