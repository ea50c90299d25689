"""The candidates for PAMR on a GPU, each an engine that `PAMR` could use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.segmentation.refinement.pamr import PAMR, RING, Engine, Gather, affinity
from talk2dino.segmentation.scores import upsample


class Shifts:
    """Weighted sums of shifted views, for `torch.compile` to fuse; weights are `[N, H, W]`."""

    def __init__(self, dilations: Sequence[int], backend: str | None) -> None:
        self.dilations, self.reach = dilations, max(dilations)
        self.offsets = [
            (self.reach + d * dy, self.reach + d * dx) for d in dilations for dy, dx in RING
        ]
        self.average: Callable[[Tensor, Tensor], Tensor] = self._average
        if backend is not None:
            self.average = torch.compile(self._average, backend=backend, dynamic=False)

    def affinity(self, image: Tensor) -> Tensor:
        """See `Engine`."""
        return affinity(image, self.dilations).t().reshape(-1, *image.shape[-2:]).contiguous()

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `Engine`."""
        values = upsample(mask[None], *weights.shape[-2:])[0]
        for _ in range(num_iter):
            values = self.average(values, weights)
        target += values * share

    def _average(self, values: Tensor, weights: Tensor) -> Tensor:
        height, width = values.shape[-2:]
        padded = F.pad(values[None], (self.reach,) * 4, mode="replicate")[0]
        total = torch.zeros_like(values)
        for weight, (y, x) in zip(weights, self.offsets, strict=True):
            total = total + weight * padded[:, y : y + height, x : x + width]
        return total


def triton_engine(dilations: Sequence[int], device: torch.device) -> Engine:
    from benchmarks.gpu_parts.pamr_triton import Triton

    return Triton(dilations)


def compiled_shifts(dilations: Sequence[int], device: torch.device) -> Engine:
    torch.compiler.reset()  # after some recompilations torch gives up and runs it as it is
    # Without a GPU only that torch can trace it is of interest, not a minute of C++ compiler.
    return Shifts(dilations, "inductor" if device.type == "cuda" else "eager")


WAYS: dict[str, Callable[[Sequence[int], torch.device], Engine]] = {
    "library calls (the product)": lambda dilations, device: Gather(dilations),
    "shifted views": lambda dilations, device: Shifts(dilations, None),
    "shifted views, torch.compile": compiled_shifts,
    "Triton": triton_engine,
}


class PAMRBy(PAMR):
    """PAMR by one of `WAYS`.

    Raises:
        ModuleNotFoundError: what the way needs is not installed.
    """

    def __init__(
        self, way: str, device: torch.device, num_iter: int = 10, dilations: Sequence[int] = ()
    ) -> None:
        super().__init__(num_iter, dilations or PAMR().dilations)
        self.way = WAYS[way](self.dilations, device)

    def engine(self, device: torch.device) -> Engine:
        """The way, whatever the device."""
        return self.way
