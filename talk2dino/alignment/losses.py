"""Contrastive losses on a score matrix `[text, image]` whose diagonal holds the true pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import ConfigError


class InfoNCE(nn.Module):
    """Symmetric InfoNCE (Talk2DINO; original `src/loss.py`).

    Mean of the cross-entropies over rows and over columns of `exp(log_scale) * scores`.

    Args:
        logit_scale: factor on the scores, 1/temperature; CLIP's 1/0.07 by default.
        learnable_logit_scale: train the factor's logarithm. The original creates the parameter but
            never hands it to its optimiser, so it stays at 1/0.07.
        normalize_by_batch_squared: divide the mean by B² as well, as the original does. Adam
            cancels a constant factor except for its epsilon and for batches of different size.
        mask_same_image: captions of one image are not each other's negatives; needs `image_ids`.

    Attributes:
        logit_scale: 0-dim log-factor; a parameter if learnable, otherwise a buffer outside the
            state dict, so that the config alone decides it.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import InfoNCE
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # [text, image]
        >>> InfoNCE(logit_scale=1.0, normalize_by_batch_squared=False)(scores)
        tensor(0.4037)
        >>> InfoNCE(logit_scale=1.0)(scores)  # divided by 2²
        tensor(0.1009)
    """

    logit_scale: Tensor

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        learnable_logit_scale: bool = False,
        normalize_by_batch_squared: bool = True,
        mask_same_image: bool = False,
    ) -> None:
        super().__init__()
        if logit_scale <= 0:
            raise ConfigError(f"loss.logit_scale is {logit_scale}: it must be positive")
        log_scale = torch.tensor(math.log(logit_scale))
        if learnable_logit_scale:
            self.logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("logit_scale", log_scale, persistent=False)
        self.normalize_by_batch_squared = normalize_by_batch_squared
        self.mask_same_image = mask_same_image

    def forward(self, scores: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            scores: `[B, B]` similarity of text i with image j; pairs on the diagonal.
            image_ids: `[B]` int64; needed with `mask_same_image`.

        Returns:
            Scalar.

        Raises:
            ConfigError: scores are not square, or `image_ids` is missing or of another length.
        """
        check_square(scores)
        logits = scores * self.logit_scale.exp()
        if self.mask_same_image:
            logits = logits.masked_fill(same_image(scores, image_ids), float("-inf"))
        labels = torch.arange(len(scores), device=scores.device)
        rows, columns = F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)
        loss = (rows + columns) / 2
        return loss / len(scores) ** 2 if self.normalize_by_batch_squared else loss


class TripletLoss(nn.Module):
    """Hinge loss in both directions, divided by B² (VSE++, original `src/loss.py`).

    Args:
        margin: how much a true pair must score above a wrong one.
        max_violation: count only the hardest negative of each row and column.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import TripletLoss
        >>> scores = torch.tensor([[0.9, 0.8], [0.2, 0.7]])  # text 0 and image 1 are 0.1 too close
        >>> TripletLoss(margin=0.2)(scores)
        tensor(0.1000)
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = True) -> None:
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def forward(self, scores: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Scalar loss of scores `[B, B]`; `image_ids` is accepted and not used.

        Raises:
            ConfigError: scores are not square.
        """
        check_square(scores)
        positive = scores.diagonal()
        diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        by_row = (self.margin + scores - positive[:, None]).clamp(min=0).masked_fill(diagonal, 0)
        by_column = (self.margin + scores - positive[None, :]).clamp(min=0).masked_fill(diagonal, 0)
        if self.max_violation:
            # `max` (not `amax`) sends the gradient of tied violations to one of them.
            by_row, by_column = by_row.max(dim=1).values, by_column.max(dim=0).values
        return (by_row.sum() + by_column.sum()) / len(scores) ** 2


def same_image(scores: Tensor, image_ids: Tensor | None) -> Tensor:
    """`[B, B]` bool, True where two different captions belong to one image."""
    if image_ids is None:
        raise ConfigError("loss.mask_same_image is true but the batch carries no image ids")
    if image_ids.shape != scores.shape[:1]:
        raise ConfigError(
            f"loss.mask_same_image: image ids have shape {tuple(image_ids.shape)}, scores "
            f"{tuple(scores.shape)}: one id per row is needed"
        )
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return (image_ids[:, None] == image_ids[None, :]) & ~diagonal


def check_square(scores: Tensor) -> None:
    """Raise a ConfigError unless scores are `[B, B]`."""
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ConfigError(
            f"loss: scores have shape {tuple(scores.shape)}, but pairs stand on the diagonal of "
            "[B, B]: give one image per caption"
        )
