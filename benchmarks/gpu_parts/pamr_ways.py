"""Ways to compute PAMR on a GPU, each an engine that `PAMR` could use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from talk2dino.segmentation.refinement.pamr import PAMR, Engine, Gather


def by_triton(dilations: Sequence[int]) -> Engine:
    """The product's kernels, whatever the device."""
    from talk2dino.segmentation.refinement.pamr_triton import TritonEngine

    return TritonEngine(dilations)


LIBRARY, TRITON = "library calls", "Triton (the product)"
WAYS: dict[str, Callable[[Sequence[int]], Engine]] = {LIBRARY: Gather, TRITON: by_triton}


class PAMRBy(PAMR):
    """PAMR by one of `WAYS`.

    Raises:
        ModuleNotFoundError: what the way needs is not installed.
    """

    def __init__(self, way: str, num_iter: int = 10, dilations: Sequence[int] = ()) -> None:
        super().__init__(num_iter, dilations or PAMR().dilations)
        self.way = WAYS[way](self.dilations)

    def engine(self, device: torch.device) -> Engine:
        """The way, whatever the device."""
        return self.way
