"""Refinement without pixels: scores spread between patches that look alike.

The patch tokens already know which parts of a picture belong together, so a patch may ask the k
patches most like it, wherever they lie. That is label propagation on the graph of nearest
neighbors (Zhou et al., "Learning with Local and Global Consistency", NIPS 2003), at the resolution
of the tokens: some thousand times fewer multiplications than PAMR, but edges stay as coarse as
patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import ConfigError, DataError, check_number

SCOPES = ("window", "picture")
HELD = 1 << 24  # cosines held at once: 67 MB
LEAST_COSINE = 1e-6  # a power of less is no weight; a row of none else is a plain mean


class KNN(nn.Module):
    """Propagate token scores over the graph of nearest patches; no parameters.

    Each iteration replaces the scores by `(1 - keep) * (mean of the neighbors) + keep * (scores
    at the start)`; the neighbors' weights are their cosine to a `power`, or the softmax of their
    cosine over `temperature`, divided by their sum.

    Args:
        k: neighbors of a patch, itself excluded; fewer if there are fewer patches.
        num_iter: how often scores are passed on; 0 changes nothing.
        keep: share of a patch's first scores, 0..1; 1 changes nothing.
        temperature: a smaller one trusts the nearest neighbors more; of no effect with a power.
        scope: `window`, a graph for every window, or `picture`, one graph over all windows: they
            share what they have learned, and where they overlap they find their twins.
        power: a larger one trusts the nearest neighbors more; None for the temperature.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation import KNN
        >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
        >>> KNN(k=2)(tokens, torch.tensor([[[[0.9, 0.1, 0.5, 0.6]]]]))
        tensor([[[[0.7436, 0.2564, 0.5195, 0.5805]]]])
    """

    def __init__(
        self,
        k: int = 32,
        num_iter: int = 10,
        keep: float = 0.05,
        temperature: float = 0.05,
        scope: str = "window",
        power: float | None = None,
    ) -> None:
        super().__init__()
        check_number("knn.k", k, 1, 1_000_000)
        check_number("knn.num_iter", num_iter, 0, 1000)
        check_number("knn.keep", keep, 0.0, 1.0)
        check_number("knn.temperature", temperature, 1e-6, 1e6)
        if scope not in SCOPES:
            raise ConfigError(f"knn.scope={scope!r}: choose one of {', '.join(SCOPES)}")
        if power is not None:
            check_number("knn.power", power, 0.0, 1e3)
        self.k, self.num_iter = k, num_iter
        self.keep, self.temperature = keep, temperature
        self.scope, self.power = scope, power

    def extra_repr(self) -> str:
        """Settings for `print(model)`."""
        sharpness = "temperature" if self.power is None else "power"
        return (
            f"k={self.k}, num_iter={self.num_iter}, keep={self.keep}, "
            f"{sharpness}={getattr(self, sharpness)}, scope={self.scope}"
        )

    @torch.no_grad()
    def forward(self, patch_tokens: Tensor, scores: Tensor) -> Tensor:
        """Refine the scores of windows.

        Args:
            patch_tokens: `[B, P, D]`, of the windows of one picture.
            scores: `[B, K, h, w]` with `h * w == P`.

        Returns:
            `[B, K, h, w]` float32, within the range of `scores`.

        Raises:
            DataError: the shapes do not belong together.
        """
        batch, patches, width = patch_tokens.shape
        if len(scores) != batch or scores[0, 0].numel() != patches:
            raise DataError(
                f"KNN: patch_tokens {tuple(patch_tokens.shape)} and scores "
                f"{tuple(scores.shape)}: give [B, P, D] and [B, K, h, w] with h * w == P"
            )
        groups = (1, batch * patches) if self.scope == "picture" else (batch, patches)
        k = min(self.k, groups[1] - 1)
        if k == 0 or self.num_iter == 0:
            return scores.float()
        tokens = F.normalize(patch_tokens.float(), dim=-1).view(*groups, width)
        start = scores.float().flatten(2).transpose(1, 2).reshape(*groups, -1)
        spread = [
            self._propagate(*self._graph(one, k), first)
            for one, first in zip(tokens, start, strict=True)
        ]
        values = torch.stack(spread).view(batch, patches, -1)
        return values.transpose(1, 2).reshape(scores.shape)

    def _graph(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Neighbors of unit rows `[N, D]` and their weights, which sum to 1: `[N, k]` each."""
        nearest, index = [], []
        size = max(HELD // len(tokens), 1)
        for start, rows in enumerate(torch.split(tokens, size)):
            cosine = rows @ tokens.t()
            cosine.diagonal(start * size).fill_(-2.0)  # a patch is no neighbor of its own
            values, places = cosine.topk(k, sorted=False)
            nearest.append(values)
            index.append(places)
        cosine = torch.cat(nearest)
        if self.power is None:
            sharpened = cosine / self.temperature
        else:
            sharpened = cosine.clamp(min=LEAST_COSINE).log() * self.power
        return torch.cat(index), sharpened.softmax(-1)

    def _propagate(self, index: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """Scores `[N, K]` to `[N, K]`."""
        values = start = start.contiguous()
        weights = weights * (1 - self.keep)
        for _ in range(self.num_iter):
            mean = F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")
            values = mean.add_(start, alpha=self.keep)
        return values
