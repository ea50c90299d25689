"""Pixel-adaptive mask refinement (PAMR), as one sparse matrix applied again and again.

Araslanov & Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020; the original
refines its masks with it. Every pixel becomes a weighted mean of its 8 neighbors at each
dilation, with weights that depend on the picture alone. So one iteration is `mask @ A.T` with a
row-stochastic matrix of `8 * len(dilations)` entries per row, the same for every class and every
iteration: it is built once, and the classes never enter it. The product is compiled, on the CPU
where Numba is installed (`pamr_numba.py`) and on CUDA where Triton is (`pamr_triton.py`); otherwise
it is a bag of weighted rows per pixel, a few classes at a time: those of one pixel lie together,
and the rows within reach of the largest dilation stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import ConfigError, DataError, check_number
from talk2dino.segmentation.scores import upsample

RING = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))

STRIP = 4096  # pixels whose neighbors are held at once: 2.5 MB with the usual dilations
CLASSES = 40  # refined together; more overflow the cache, fewer repeat the work per neighbor
LANES = 8  # classes are filled up to a multiple, so that rows start where vectors do


class PAMR(nn.Module):
    """Refine soft masks along the edges of a picture; no parameters, float32, no gradient.

    Args:
        num_iter: how often the masks are averaged; 0 only resizes them.
        dilations: distances of the neighbors in pixels; 8 neighbors each.
        compiled: use compiled code where there is some: on the CPU with Numba (the extra `fast`),
            on CUDA with Triton (comes with PyTorch on Linux); results agree to 1e-5.
        whole_image: the segmenter applies it once to the average of the windows instead of to every
            window. Not what the original does; overlapping windows cost two to four times less.

    Raises:
        ConfigError: a negative `num_iter`, or no or non-positive dilations.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation import PAMR
        >>> image = torch.zeros(1, 3, 4, 8)
        >>> image[..., 4:] = 255.0  # an edge in the middle
        >>> mask = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]]]]).repeat(1, 1, 2, 1)
        >>> PAMR(num_iter=10, dilations=(1, 2))(image, mask)[0, 0, 0]
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.4618, 0.4613, 0.4610, 0.4604])
    """

    def __init__(
        self,
        num_iter: int = 10,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        compiled: bool = True,
        whole_image: bool = False,
    ) -> None:
        super().__init__()
        check_number("pamr.num_iter", num_iter, 0, 1000)
        if not isinstance(dilations, Sequence) or not dilations:
            raise ConfigError(f"pamr.dilations={dilations!r:.60}: give distances, as in [1,2,4]")
        for distance in dilations:
            check_number("pamr.dilations", distance, 1, 8192)
        self.num_iter = num_iter
        self.dilations = tuple(dilations)
        self.compiled = compiled
        self.whole_image = whole_image

    def extra_repr(self) -> str:
        """Settings for `print(model)`."""
        return f"num_iter={self.num_iter}, dilations={self.dilations}"

    @torch.no_grad()
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Refine `mask` by the edges of `image`.

        Args:
            image: `[B, 3, H, W]`, uint8 or float; only ratios of differences count, so neither
                0..255 against 0..1 nor the channel order matters.
            mask: scores `[B, C, h, w]`; resized to the picture first (align_corners=True).

        Returns:
            `[B, C, H, W]` float32.

        Raises:
            DataError: the tensors are not 4-D or have different batch sizes.
        """
        if image.ndim != 4 or mask.ndim != 4 or len(image) != len(mask):
            raise DataError(
                f"PAMR: image {tuple(image.shape)} and mask {tuple(mask.shape)}: "
                "give [B, 3, H, W] and [B, C, h, w] with the same B"
            )
        pairs = zip(self.prepare(image), mask, strict=True)
        return torch.stack([refine(one) for refine, one in pairs])

    @torch.no_grad()
    def prepare(self, images: Iterable[Tensor]) -> Iterator[Prepared]:
        """Compute what does not depend on the masks, for several masks of the same pictures.

        Args:
            images: `[3, H, W]` each; sizes may differ, equal sizes share their neighbor index.

        Yields:
            A function from `[C, h, w]` to `[C, H, W]` float32. It holds `8 * len(dilations)`
            float32 per pixel.
        """
        engine: Engine | None = None
        for image in images:
            engine = engine or self.engine(image.device)
            weights = engine.affinity(image.float()) if self.num_iter else torch.empty(0)
            size = (image.shape[-2], image.shape[-1])
            yield Prepared(engine, weights, size, self.num_iter)

    def engine(self, device: torch.device) -> Engine:
        """What computes on `device`: compiled code if allowed and installed, else library calls."""
        with suppress(ImportError):  # without Numba, without Triton
            if self.compiled and device.type == "cpu":
                from talk2dino.segmentation.refinement.pamr_numba import NumbaEngine

                return NumbaEngine(self.dilations, RING)
            if self.compiled and device.type == "cuda":
                from talk2dino.segmentation.refinement.pamr_triton import TritonEngine, runs_on

                if runs_on(device, self.dilations):
                    return TritonEngine(self.dilations)
        return Gather(self.dilations)


class Engine(Protocol):
    """The two steps of a refinement."""

    def affinity(self, image: Tensor) -> Tensor:
        """Weights of a picture `[3, H, W]` float (see `affinity`), in the engine's own order."""

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """Add `[C, h, w]` float32, enlarged and averaged `num_iter >= 1` times, to `target`.

        `target` is `[C, H, W]` float32, or a part of such a tensor; of every pixel `share` `[H, W]`
        is added.
        """


@dataclass(frozen=True)
class Prepared:
    """Refine masks of one picture: see `PAMR.prepare`."""

    engine: Engine
    weights: Tensor
    size: tuple[int, int]
    num_iter: int

    @torch.no_grad()
    def __call__(self, mask: Tensor) -> Tensor:
        """`[C, h, w]` to `[C, H, W]` float32."""
        result = torch.zeros(len(mask), *self.size, device=mask.device)
        self.add_to(result, mask, torch.ones(self.size, device=mask.device))
        return result

    @torch.no_grad()
    def add_to(self, target: Tensor, mask: Tensor, share: Tensor) -> None:
        """Add `share` `[H, W]` of the refined `[C, h, w]` to `[C, H, W]`, all float32.

        `target` may be a part of a picture, and `share` what counts of each window there.
        """
        if self.num_iter:
            self.engine.refine(self.weights, mask.float(), target, share, self.num_iter)
        else:
            target += upsample(mask.float()[None], *self.size)[0] * share


class Gather:
    """Both steps by library calls, on any device; keeps the index of the last size."""

    def __init__(self, dilations: Sequence[int]) -> None:
        self.dilations = dilations
        self.size = (0, 0)
        self.index = torch.empty(0)

    def affinity(self, image: Tensor) -> Tensor:
        """See `Engine`."""
        return affinity(image, self.dilations)

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `Engine`."""
        size = (share.shape[0], share.shape[1])
        if self.size != size:
            self.index = neighbors(*size, self.dilations, mask.device)  # [HW, N]
            self.size = size
        parts = -(-len(mask) // CLASSES)  # none is much smaller than the others
        for part, planes in zip(mask.tensor_split(parts), target.tensor_split(parts), strict=True):
            values = _class_last(part, *size)
            for _ in range(num_iter):
                values = F.embedding_bag(self.index, values, per_sample_weights=weights, mode="sum")
            planes += values[:, : len(part)].t().view(-1, *size) * share


def _class_last(mask: Tensor, height: int, width: int) -> Tensor:
    """Enlarge `[C, h, w]` to `[height * width, C]`, filled up with zeros to whole vectors."""
    filled = F.pad(mask, (0, 0, 0, 0, 0, -len(mask) % LANES))[None]
    large = upsample(filled.contiguous(memory_format=torch.channels_last), height, width)
    return large.permute(0, 2, 3, 1).reshape(height * width, -1)


def neighbors(
    height: int, width: int, dilations: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Flat index `[H*W, 8*len(dilations)]` int32 of every pixel's neighbors.

    Dilation-major, then row-major; beyond the border the nearest pixel is taken (replicate
    padding).
    """
    dy, dx = (
        torch.tensor([dilation * step[axis] for dilation in dilations for step in RING])
        for axis in (0, 1)
    )
    rows = (torch.arange(height)[:, None] + dy).clamp_(0, height - 1)  # [H, N]
    columns = (torch.arange(width)[:, None] + dx).clamp_(0, width - 1)  # [W, N]
    rows, columns = (part.to(device, torch.int32) for part in (rows * width, columns))
    return (rows[:, None] + columns).flatten(0, 1)


def affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """How much every pixel listens to each neighbor.

    softmax over all neighbors of the channel mean of `-|difference| / (1e-8 + 0.1 std)`, with
    one unbiased standard deviation per pixel and channel over all `9 * len(dilations)` samples
    (the pixel itself counts once per dilation).

    Args:
        image: `[3, H, W]` float.
        dilations: distances of the neighbors in pixels.

    Returns:
        `[H*W, 8*len(dilations)]` float32, rows sum to 1, order of `neighbors`.
    """
    height, width = image.shape[-2:]
    reach = max(dilations)
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")[0]
    offsets = [(reach + d * dy, reach + d * dx) for d in dilations for dy, dx in RING]
    result = image.new_empty(height * width, len(offsets))
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        center = image[:, top : top + rows]  # [3, rows, W]
        shifted = [padded[:, top + y :][:, : center.shape[1], x : x + width] for y, x in offsets]
        difference = torch.stack(shifted, 1).sub_(center[:, None])  # [3, N, rows, W]
        logits = _logits(difference, samples=9 * len(dilations))
        result[top * width :][: logits.shape[1]] = logits.t().softmax(-1)
    return result


def _logits(difference: Tensor, samples: int) -> Tensor:
    """`[3, N, rows, W]` neighbor minus pixel to `[N, rows*W]`; overwrites its argument.

    Differences from the pixel itself are exactly zero in flat regions, and since the pixel is a
    ninth of its own samples, the subtraction of the squared mean loses at most a factor of nine.
    """
    squares, mean = difference.square().sum(1), difference.sum(1) / samples
    variance = (squares - samples * mean.square()).clamp_(min=0) / (samples - 1)
    scale = -1 / (len(difference) * (1e-8 + 0.1 * variance.sqrt()))
    return difference.abs_().mul_(scale[:, None]).sum(0).flatten(1)
