"""PAMR as two Triton kernels: the weights of a picture, and one averaging of all classes.

Neighbors are computed from the pixel's own place, so no index is read; the 48 values of a pixel are
never stored, and neighboring pixels lie together in memory for every load. The sum over neighbors
has one order for all classes, so equal classes get equal bits and larger scores nowhere smaller
results, which `segmentation/labels.py` rests on.

Runs on CUDA, and on the CPU in Triton's interpreter (`TRITON_INTERPRET=1` before the import).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from talk2dino.segmentation.refinement.pamr import RING
from talk2dino.segmentation.scores import upsample

# Pixels and classes of a program of `average`, pixels of one of `weigh`: untuned on a GPU; large in
# the interpreter, which takes a while for every program.
BLOCKS, INTERPRETED = (128, 8, 16), (4096, 32, 512)


@triton.jit
def weigh(
    image, steps, weights, height, width, neighbors, samples,
    BLOCK: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """Weights `[N, H*W]` of a picture `[3, H*W]`; `WIDEST` is a power of two, at least N."""
    pixels = height * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, WIDEST)
    inside, real = place < pixels, number < neighbors
    both = inside[:, None] & real[None, :]
    dy = tl.load(steps + 2 * number, mask=real, other=0)
    dx = tl.load(steps + 2 * number + 1, mask=real, other=0)
    y = tl.minimum(tl.maximum((place // width)[:, None] + dy[None, :], 0), height - 1)
    x = tl.minimum(tl.maximum((place % width)[:, None] + dx[None, :], 0), width - 1)
    logits = tl.zeros([BLOCK, WIDEST], tl.float32)
    for channel in tl.static_range(3):
        plane = image + channel * pixels
        center = tl.load(plane + place, mask=inside, other=0)
        beside = tl.load(plane + y * width + x, mask=both, other=0)
        difference = tl.where(both, beside - center[:, None], 0)
        mean = tl.sum(difference, 1) / samples
        variance = (tl.sum(difference * difference, 1) - samples * mean * mean) / (samples - 1)
        scale = -1 / (3 * (1e-8 + 0.1 * tl.sqrt(tl.maximum(variance, 0))))
        logits += tl.abs(difference) * scale[:, None]
    powers = tl.where(real[None, :], tl.exp(logits - tl.max(logits, 1)[:, None]), 0)
    total = tl.sum(powers, 1)
    to = weights + number[None, :].to(tl.int64) * pixels + place[:, None]
    tl.store(to, powers / total[:, None], mask=both)


@triton.jit
def average(
    values, weights, steps, result, height, width, neighbors, classes,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One iteration, `[C, H*W]` to `[C, H*W]`, with weights `[N, H*W]`."""
    pixels = height * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    name = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    inside = place < pixels
    both = (name < classes)[:, None] & inside[None, :]
    planes = name.to(tl.int64)[:, None] * pixels
    y, x = place // width, place % width
    total = tl.zeros([TOGETHER, BLOCK], tl.float32)
    weights += place
    for number in range(neighbors):
        row = tl.minimum(tl.maximum(y + tl.load(steps + 2 * number), 0), height - 1)
        column = tl.minimum(tl.maximum(x + tl.load(steps + 2 * number + 1), 0), width - 1)
        seen = tl.load(values + planes + (row * width + column)[None, :], mask=both, other=0)
        total += seen * tl.load(weights, mask=inside, other=0)[None, :]
        weights += pixels
    tl.store(result + planes + place[None, :], total, mask=both)


class Triton:
    """An `Engine` of `PAMR`; weights are `[8 * len(dilations), H*W]`."""

    def __init__(self, dilations: Sequence[int]) -> None:
        self.dilations = tuple(dilations)
        self.count = len(RING) * len(self.dilations)
        self.blocks = INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else BLOCKS

    def affinity(self, image: Tensor) -> Tensor:
        """See `Engine`."""
        height, width = image.shape[-2:]
        weights = image.new_empty(self.count, height * width)
        block = self.blocks[2]
        weigh[(triton.cdiv(height * width, block),)](
            image.contiguous(), _steps(self.dilations, image.device), weights, height, width,
            self.count, 9 * len(self.dilations),
            BLOCK=block, WIDEST=triton.next_power_of_2(self.count),
        )  # fmt: skip
        return weights

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `Engine`."""
        height, width = share.shape
        values = upsample(mask[None], height, width)[0].contiguous()
        result = torch.empty_like(values)
        block, together, _ = self.blocks
        grid = (triton.cdiv(height * width, block), triton.cdiv(len(mask), together))
        for _ in range(num_iter):
            average[grid](
                values, weights, _steps(self.dilations, mask.device), result, height, width,
                self.count, len(mask), BLOCK=block, TOGETHER=together,
            )  # fmt: skip
            values, result = result, values
        target += values * share


@cache
def _steps(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows and columns to every neighbor, `[N, 2]` int32, in the order of `pamr.neighbors`."""
    steps = [(dilation * dy, dilation * dx) for dilation in dilations for dy, dx in RING]
    return torch.tensor(steps, dtype=torch.int32, device=device)
