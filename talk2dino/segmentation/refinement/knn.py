"""Refinement without pixels: scores spread between patches that look alike.

The patch tokens already know which parts of a window belong together, so a patch may ask the k
patches most like it, wherever they lie. That is label propagation on the graph of nearest
neighbors (Zhou et al., "Learning with Local and Global Consistency", NIPS 2003), at the resolution
of the tokens: some thousand times fewer multiplications than PAMR, but edges stay as coarse as
patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import ConfigError, DataError


class KNN(nn.Module):
    """Propagate token scores over every window's graph of nearest patches; no parameters.

    Each iteration replaces the scores by `(1 - keep) * (mean of the neighbors) + keep * (scores
    at the start)`; the neighbors' weights are the softmax of their cosine over `temperature`.

    Args:
        k: neighbors of a patch, itself excluded; fewer if the window has fewer patches.
        num_iter: how often scores are passed on; 0 changes nothing.
        keep: share of a patch's first scores, 0..1; 1 changes nothing.
        temperature: a smaller one trusts the nearest neighbors more.

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
        self, k: int = 32, num_iter: int = 10, keep: float = 0.05, temperature: float = 0.05
    ) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"knn.k={k}: use 1 or more")
        if num_iter < 0:
            raise ConfigError(f"knn.num_iter={num_iter}: use 0 or more")
        if not 0 <= keep <= 1:
            raise ConfigError(f"knn.keep={keep}: use 0..1")
        if temperature <= 0:
            raise ConfigError(f"knn.temperature={temperature}: use more than 0")
        self.k, self.num_iter = k, num_iter
        self.keep, self.temperature = keep, temperature

    def extra_repr(self) -> str:
        """Settings for `print(model)`."""
        return (
            f"k={self.k}, num_iter={self.num_iter}, keep={self.keep}, "
            f"temperature={self.temperature}"
        )

    @torch.no_grad()
    def forward(self, patch_tokens: Tensor, scores: Tensor) -> Tensor:
        """Refine the scores of windows.

        Args:
            patch_tokens: `[B, P, D]`.
            scores: `[B, K, h, w]` with `h * w == P`.

        Returns:
            `[B, K, h, w]` float32, within the range of `scores`.

        Raises:
            DataError: the shapes do not belong together.
        """
        batch, patches, _ = patch_tokens.shape
        if len(scores) != batch or scores[0, 0].numel() != patches:
            raise DataError(
                f"KNN: patch_tokens {tuple(patch_tokens.shape)} and scores {tuple(scores.shape)}: "
                "give [B, P, D] and [B, K, h, w] with h * w == P"
            )
        k = min(self.k, patches - 1)
        start = scores.float().flatten(2).transpose(1, 2)  # [B, P, K]
        if k == 0 or self.num_iter == 0:
            return scores.float()
        tokens = F.normalize(patch_tokens.float(), dim=-1)
        values = torch.stack(
            [self._propagate(*pair, k) for pair in zip(tokens, start, strict=True)]
        )
        return values.transpose(1, 2).reshape(scores.shape)

    def _propagate(self, tokens: Tensor, start: Tensor, k: int) -> Tensor:
        """One window: `[P, D]` unit rows and `[P, K]` to `[P, K]`."""
        cosine = (tokens @ tokens.t()).fill_diagonal_(-2.0)  # [P, P]
        nearest, index = cosine.topk(k, sorted=False)  # [P, k]
        weights = (nearest / self.temperature).softmax(-1) * (1 - self.keep)
        values = start = start.contiguous()
        for _ in range(self.num_iter):
            mean = F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")
            values = mean.add_(start, alpha=self.keep)
        return values
