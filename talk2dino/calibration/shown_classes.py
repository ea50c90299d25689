"""The vectors of classes that pictures show, told from the patches of other places and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import DataError
from talk2dino.segmentation.segmenter import EncodedImage

PATCHES = 256  # of a picture that stand for all of it
SHRINKAGE = 1.0  # of the covariance, in units of its mean variance; see docs/exemplars.md


@dataclass(frozen=True, eq=False)
class Seen:
    """What the encoder saw of an exemplar, of unit patch tokens.

    Attributes:
        inside: `[D]` their mean inside the mask; a patch counts by the share that lies there.
        outside: `[D]` their mean outside; NaN if the mask leaves less than a patch.
        patches: `[N, D]`, evenly taken from the whole picture, at most `PATCHES`.
    """

    inside: Tensor
    outside: Tensor
    patches: Tensor

    @classmethod
    def of(cls, tokens: Tensor, share: Tensor) -> Seen:
        """That of unit patch tokens `[N, D]` of all windows, of which `[N]` lies inside, 0..1."""
        rest = 1 - share
        outside = rest @ tokens / (rest.sum() if rest.sum() >= 1 else torch.nan)
        taken = torch.linspace(0, len(tokens) - 1, min(PATCHES, len(tokens))).round().long()
        return cls(share @ tokens / share.sum(), outside, tokens[taken.to(tokens.device)])

    @classmethod
    def unpacked(cls, packed: Tensor) -> Seen:
        """That of which `[2 + N, D]` is `packed`."""
        return cls(packed[0], packed[1], packed[2:])

    @property
    def packed(self) -> Tensor:
        """All in one tensor."""
        return torch.cat([self.inside[None], self.outside[None], self.patches])


@dataclass(frozen=True, eq=False)
class Spread:
    """How patch tokens lie: mean `[D]` and covariance `[D, D]`."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Spread:
        """That of `[N, D]`."""
        return cls(tokens.mean(0), torch.cov(tokens.T, correction=0))


@torch.no_grad()
def see(encoded: EncodedImage, inside: Tensor, project: nn.Module | None) -> Seen:
    """What the encoder saw of an exemplar.

    Args:
        encoded: its picture.
        inside: `[H, W]` bool, its mask.
        project: the image side of a projection, see `Segmenter`.
    """
    tokens, grid = encoded.features.patch_tokens, encoded.features.grid
    if project is not None:
        tokens = project(tokens)
    size = (encoded.image.shape[-2], encoded.image.shape[-1])
    mask = F.adaptive_avg_pool2d(inside.float()[None], size)
    parts = [F.adaptive_avg_pool2d(w.crop(mask), grid).flatten() for w in encoded.windows]
    unit = F.normalize(tokens.float().flatten(0, 1), dim=-1, eps=1e-6)
    return Seen.of(unit, torch.cat(parts).to(unit))


def class_rows(
    classes: Sequence[Sequence[Seen]], reference: Spread | None
) -> tuple[Tensor, Tensor | None]:
    """The rows of classes as their exemplars show them, `[K, D]` of unit length.

    The mean of the patches inside, less what other patches have in common, along the directions
    in which patches hardly differ otherwise: Fisher's linear discriminant, with a covariance that
    is shrunk towards a multiple of the identity. As a row its cosine with raw patch tokens is
    that of centered and decorrelated ones in the numerator.

    Args:
        classes: the exemplars of each, at least one; all count the same.
        reference: unit patch tokens of unlabeled pictures, of a calibration, which also gives rows
            their offsets. Without, the pictures of all exemplars together take their part.

    Returns:
        The rows, and without a reference the mean patch `[D]` of these pictures: what a row scores
        there is its offset, as by `MeanOffset`.

    Raises:
        DataError: patches inside do not differ from those that they are compared with.
    """
    if reference is not None:
        return torch.stack([_row(one, reference) for one in classes]), None
    every = [seen for exemplars in classes for seen in exemplars]
    if len(classes) == 1 and all(seen.outside.isnan().any() for seen in every):
        raise DataError(
            "exemplars: the masks cover their pictures whole, so there is nothing to tell the "
            "class from; show what is not the class as well, or calibrate the checkpoint"
        )
    own = Spread.of(torch.cat([seen.patches for seen in every]))
    return torch.stack([_row(one, own) for one in classes]), own.mean


def _row(exemplars: Sequence[Seen], reference: Spread) -> Tensor:
    outside = [seen.outside for seen in exemplars if not seen.outside.isnan().any()]
    others = [*([torch.stack(outside).mean(0)] if outside else []), reference.mean]
    inside = torch.stack([seen.inside for seen in exemplars]).mean(0)
    added = (SHRINKAGE * reference.covariance.diagonal().mean()).clamp(min=1e-8)
    shrunk = reference.covariance + added * torch.eye(len(inside)).to(inside)
    row = torch.linalg.solve(shrunk, inside - torch.stack(others).mean(0))
    if not row.norm() > 0:
        raise DataError("exemplars: the patches inside a mask are like all others; show another")
    return F.normalize(row, dim=0)
