"""PAMR on a GPU: two Triton kernels, the weights of a picture and one averaging of all classes.

For a reader of NumPy: a kernel is a function that runs many times at once; each run, a "program",
has its own number. Its values are arrays of fixed shape; `tl.load` and `tl.store` take an array of
addresses, `pointer + index`, as `memory.ravel()[index]` does. A program looks after a block of
pixels, and in `average` after `TOGETHER` classes of them, which lie side by side in memory: a
neighbor is one aligned load of several classes.

Neighbors are computed from a pixel's own place, so no index is read; the copies of all neighbors
are never stored. All classes add their neighbors in one order, so equal classes get equal bits and
larger scores nowhere smaller results: `segmentation/labels.py` rests on it.

Import this module only where it is needed: it imports Triton, which PyTorch for CUDA on Linux
brings along. With `TRITON_INTERPRET=1` set before, it runs on the CPU, slowly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation.refinement.pamr import Gather
from talk2dino.segmentation.scores import upsample

HELD = 1 << 26  # scores of one array: 268 MB, two of which an iteration needs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOGETHER = 16  # classes of a program of `average`; they are filled up to a multiple
MOST = (1 << 27) - 4096  # pixels: times TOGETHER, as 32 bits count

# Pixels of a program, large in the interpreter, which takes a while for every program. 128 with
# eight warps are 6 % faster at 21 classes and 4 % slower at 171, where it is more of a second.
BLOCK = 512 if INTERPRETED else 64
WEIGHED = 512 if INTERPRETED else 16  # pixels of a program of `weigh`


def compiled(kernel: Callable[..., None]) -> Any:
    """Compile on first use, once for all sizes of pictures."""
    return triton.jit(kernel, do_not_specialize=["height", "width", "rings", "classes"])


@compiled
def weigh(  # type: ignore[no-untyped-def]
    image, dilations, weights, height, width, rings,
    BLOCK: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """Weights `[8 * rings, H*W]` of a picture `[3, H*W]`, as `pamr.affinity` describes them.

    Arrays are `[BLOCK, WIDEST]`: a row per pixel, a column per neighbor. Sizes of arrays are powers
    of two, so there may be more columns than neighbors and more rows than pixels; `both` says which
    are real. Columns go round a square of nine, whose middle is left out.
    """
    pixels = height * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, WIDEST)
    inside, real = place < pixels, number < 8 * rings
    both = inside[:, None] & real[None, :]
    distance = tl.load(dilations + number // 8, mask=real, other=0)
    cell = number % 8 + (number % 8 >= 4).to(tl.int32)
    dy, dx = distance * (cell // 3 - 1), distance * (cell % 3 - 1)
    y = tl.minimum(tl.maximum((place // width)[:, None] + dy[None, :], 0), height - 1)
    x = tl.minimum(tl.maximum((place % width)[:, None] + dx[None, :], 0), width - 1)
    samples = 9 * rings  # the pixel itself counts once per dilation
    logits = tl.zeros([BLOCK, WIDEST], tl.float32)
    for channel in tl.static_range(3):
        plane = image + channel * pixels
        center = tl.load(plane + place, mask=inside, other=0)
        beside = tl.load(plane + (y * width + x), mask=both, other=0)
        difference = tl.where(both, beside - center[:, None], 0)
        mean = tl.sum(difference, 1) / samples
        variance = (tl.sum(difference * difference, 1) - samples * mean * mean) / (samples - 1)
        scale = -1 / (3 * (1e-8 + 0.1 * tl.sqrt(tl.maximum(variance, 0))))
        logits += tl.abs(difference) * scale[:, None]
    powers = tl.where(real[None, :], tl.exp(logits - tl.max(logits, 1)[:, None]), 0)
    total = tl.sum(powers, 1)
    to = weights + number[None, :].to(tl.int64) * pixels + place[:, None]
    tl.store(to, powers / total[:, None], mask=both)


@compiled
def average(  # type: ignore[no-untyped-def]
    values, weights, dilations, result, height, width, rings, groups,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One iteration, `[H*W, TOGETHER * groups]` to the same, with the weights of `weigh`.

    Arrays are `[BLOCK, TOGETHER]`: a row per pixel, a column per class. Programs of the same pixels
    follow each other, so that a weight comes from memory once for all classes. The eight neighbors
    of a ring are written out by the compiler (`static_range`). Beyond the last pixel others are
    read, nothing is stored.
    """
    pixels, row_length = height * width, groups * TOGETHER
    place = tl.program_id(0) // groups * BLOCK + tl.arange(0, BLOCK)
    name = tl.program_id(0) % groups * TOGETHER + tl.arange(0, TOGETHER)
    inside = place < pixels
    y, x = place // width, place % width
    total = tl.zeros([BLOCK, TOGETHER], tl.float32)
    weights += place
    for ring in range(rings):
        distance = tl.load(dilations + ring)
        for dy in tl.static_range(-1, 2):
            row = tl.minimum(tl.maximum(y + dy * distance, 0), height - 1) * width
            for dx in tl.static_range(-1, 2):
                if dy != 0 or dx != 0:
                    column = tl.minimum(tl.maximum(x + dx * distance, 0), width - 1)
                    near = (row + column)[:, None] * row_length + name[None, :]
                    weight = tl.load(weights, mask=inside, other=0)
                    seen = tl.load(values + near)
                    total += seen * weight[:, None]
                    weights += pixels
    tl.store(result + (place[:, None] * row_length + name[None, :]), total, mask=inside[:, None])


class TritonEngine:
    """The two steps of a refinement (`pamr.Engine`) for pictures on a GPU.

    Places are counted in 32 bits: arrays of scores have `HELD` elements at most, or `TOGETHER`
    classes.

    Args:
        dilations: distances of the neighbors in pixels.
    """

    def __init__(self, dilations: Sequence[int]) -> None:
        self.dilations = tuple(dilations)

    def affinity(self, image: Tensor) -> Tensor:
        """`[3, H, W]` float to `[8 * len(dilations), H*W]`.

        Raises:
            DataError: more than `MOST` pixels.
        """
        (height, width), rings = image.shape[-2:], len(self.dilations)
        if height * width > MOST:
            raise DataError(
                f"PAMR: a picture of {height}x{width} has more than {MOST:,} pixels, too many for "
                "the kernels: make it smaller, or use PAMR(compiled=False)"
            )
        weights = image.new_empty(8 * rings, height * width)
        with torch.cuda.device(image.get_device()):  # kernels go to the current one
            weigh[(triton.cdiv(height * width, WEIGHED),)](
                image.contiguous(), on_device(self.dilations, image.device), weights, height, width,
                rings, BLOCK=WEIGHED, WIDEST=triton.next_power_of_2(8 * rings),
            )  # fmt: skip
        return weights

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `pamr.Engine`."""
        groups = max(HELD // (TOGETHER * share.numel()), 1)  # held at once
        parts = -(-len(mask) // (groups * TOGETHER))  # none is much smaller
        with torch.cuda.device(mask.get_device()):
            pairs = zip(mask.tensor_split(parts), target.tensor_split(parts), strict=True)
            for part, planes in pairs:
                planes.addcmul_(self._averaged(part, weights, share.shape, num_iter), share)

    def _averaged(self, mask: Tensor, weights: Tensor, size: torch.Size, num_iter: int) -> Tensor:
        """Enlarge and average: `[C, h, w]` to `[C, H, W]`, a new tensor."""
        filled = F.pad(mask, (0, 0, 0, 0, 0, -len(mask) % TOGETHER))[None]
        large = upsample(filled.contiguous(memory_format=torch.channels_last), *size)
        values = large.permute(0, 2, 3, 1).reshape(size.numel(), -1).contiguous()
        result, groups = torch.empty_like(values), values.shape[1] // TOGETHER
        for _ in range(num_iter):
            average[(triton.cdiv(size.numel(), BLOCK) * groups,)](
                values, weights, on_device(self.dilations, mask.device), result, *size,
                len(self.dilations), groups, BLOCK=BLOCK, TOGETHER=TOGETHER, num_warps=4,
            )  # fmt: skip
            values, result = result, values
        return values[:, : len(mask)].t().view(-1, *size)


@cache
def on_device(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """Distances as int32 where a kernel can read them; copied once."""
    return torch.tensor(dilations, dtype=torch.int32, device=device)


@cache
def runs_on(device: torch.device, dilations: tuple[int, ...]) -> bool:
    """Whether kernels can be made for `device` and agree with library calls there.

    Tried on a small picture, once; a warning says why not.

    Triton takes compute capability 7.0 and later, and needs a C compiler and Python's headers.
    """
    try:
        rows, columns = torch.arange(5.0, device=device)[:, None], torch.arange(7.0, device=device)
        image = torch.stack([(rows * k + columns * columns).sin() for k in (1, 2, 3)])
        mask = torch.stack([(rows[:3] - columns[:4] * k).cos() for k in range(18)])
        found = []
        for engine in (TritonEngine(dilations), Gather(dilations)):
            target, share = torch.zeros(18, 5, 7, device=device), torch.ones(5, 7, device=device)
            engine.refine(engine.affinity(image), mask, target, share, 2)
            found.append(target)
        away = float((found[0] - found[1]).abs().max())
        if not away <= 1e-5:  # also if it is no number
            raise RuntimeError(f"the kernels are {away:.1g} from library calls")
    except Exception as error:  # Triton's own, the compiler's, the operating system's
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        warnings.warn(
            f"PAMR: no good kernels by Triton for {device} ({said}); library calls give the same "
            "results, many times slower. It needs a C compiler and Python's headers (python3-dev)",
            stacklevel=2,
        )
        return False
    return True
