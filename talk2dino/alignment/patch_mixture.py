"""Every patch explained by a word of its image: what a word shares with others, others may explain.

A contrastive loss asks which images have a word, so whatever the images of a frequent word have in
common counts for it: dogs run on grass, and "dog" comes to mean grass. Here the words of an image
compete for its patches: where "grass" explains a patch, "dog" need not. The idea is that of
mixtures over the words of a picture (Barnard et al., "Matching Words and Pictures", JMLR 2003); as
densities of patch tokens, normalized within the step, it is a rule of this project, measured in
docs/notes/better-masks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_mixture(
    text: Tensor,
    patch_tokens: Tensor,
    positive: Tensor,
    concentration: float,
    unexplained: float,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Minus the mean log likelihood ratio of an image's patches under the words that it has.

    A word w has the density p(x | w) ∝ exp(concentration · cos(x, w)) of patches x, relative to
    those of the step: divided by its mean over all of them. A patch of an image with n words has
    the likelihood ratio `(1 - unexplained) · Σ p(x | w) / n + unexplained`, of which the last term
    is what no word speaks of.

    Args:
        text: `[K, D]` words.
        patch_tokens: `[B, P, D]` of this rank's images.
        positive: `[K, B]` bool, which images have which word.
        concentration: of the densities, κ of a von Mises-Fisher distribution.
        unexplained: share of patches that no word explains, between 0 and 1.
        gather: joins `[n, …]` of all ranks, with gradient.

    Returns:
        A scalar over the images of all ranks; images without words are left out, and without any
        it is 0.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.patch_mixture import patch_mixture
        >>> patches = torch.eye(2)[:, None]  # two images of one patch, at right angles
        >>> words = torch.eye(2)
        >>> own = torch.tensor([[True, False], [False, True]])
        >>> losses = [patch_mixture(words, patches, has, 30.0, 0.1) for has in (own, ~own)]
        >>> [round(float(loss), 3) for loss in losses]  # -log(0.9 * 2 + 0.1), -log(0.1)
        [-0.642, 2.303]
    """
    words, patches = F.normalize(text, dim=-1), F.normalize(patch_tokens.to(text.dtype), dim=-1)
    images, count, _ = patches.shape
    logits = concentration * (words @ patches.flatten(0, 1).T)  # [K, B * P]
    totals = gather(logits.logsumexp(1)[None])  # [W, K]
    patches_of_all = images * count * len(totals)
    logits = logits - (totals.logsumexp(0) - math.log(patches_of_all))[:, None]
    own = logits.view(-1, images, count).masked_fill(~positive[..., None], -torch.inf)
    several = positive.sum(0)  # [B]
    has_words = several > 0
    own = own.masked_fill(~has_words[:, None], 0.0)  # no gradient of nothing
    explained = own.logsumexp(0) - several.clamp(min=1).log()[:, None]  # [B, P]
    floor = explained.new_tensor(unexplained).log()
    ratio = torch.logaddexp(explained + math.log1p(-unexplained), floor)
    losses = gather((-ratio.mean(1) * has_words)[:, None])
    counted = gather(has_words.to(losses.dtype)[:, None]).sum()
    total: Tensor = losses.sum() / counted.clamp(min=1)
    return total
