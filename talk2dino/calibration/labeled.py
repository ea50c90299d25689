"""Offsets of classes, and the background's score, from a handful of labeled pictures.

What a word scores on patches of any kind is known without labels (`rules.py`). What is left, that a
word is taken for its neighbors' things, takes labels to see: a few pictures give every class that
occurs in them a further offset. Logistic regression of the classes' scores, with one slope for all
of them and every class as heavy as the others. A rule of this project, measured in
docs/calibration.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.errors import Advance, ConfigError, DataError
from talk2dino.evaluation.metrics import mean_iou
from talk2dino.segmentation.segmenter import EncodedImage, Segmenter

FOLDS = 5
RIDGE = 0.01  # on the offsets, in units of the regression's log odds
SLOPE = 30.0  # log odds per cosine that the regression starts from
MOST = 1 << 28  # scores held at once, 1 GiB


@dataclass(frozen=True, eq=False)
class LabeledPatches:
    """Patches whose class is known, and what every class scores on them.

    Attributes:
        scores: `[N, K]` float32 log odds of the scores: cosine minus offset. A background is the
            first class and has the same value everywhere.
        labels: `[N]` int64, 0 … K - 1.
        picture: `[N]` int64, 0 … pictures - 1.
        pictures: how many there are.
    """

    scores: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    picture: Tensor = field(repr=False)
    pictures: int

    def of(self, chosen: Tensor) -> LabeledPatches:
        """Those patches for which `chosen` `[N]` is true."""
        return replace(
            self,
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            picture=self.picture[chosen],
        )

    def mean_iou(self, offsets: Tensor) -> float:
        """Mean IoU of the patches' best classes, over the classes that occur or are found.

        Args:
            offsets: `[K]`, or `[N, K]` of every patch, to subtract from the scores.
        """
        classes = self.scores.shape[1]
        found = (self.scores - offsets).argmax(1)
        pairs = torch.bincount(self.labels * classes + found, minlength=classes**2)
        return mean_iou(pairs.view(classes, classes))


@dataclass(frozen=True, eq=False)
class FittedOffsets:
    """What the labels say, and what it is worth.

    Attributes:
        offsets: `[K]` to subtract from the log odds; 0 for classes that no picture shows.
        before: mean IoU of the labeled patches without the offsets, 0..1.
        crossed: the same with offsets, every picture by those that were fitted without it.
        folds: how often was fitted for that.
    """

    offsets: Tensor = field(repr=False)
    before: float
    crossed: float
    folds: int


@torch.no_grad()
def label_patches(
    benchmark: Benchmark,
    segmenter: Segmenter,
    text: Tensor,
    row_classes: Tensor,
    background: float,
    advance: Advance = lambda done, total: None,
) -> LabeledPatches:
    """Score the patches of all windows of a benchmark's pictures; the most frequent label counts.

    Args:
        benchmark: pictures with label maps.
        segmenter: without cleaning and refinement.
        text: `[R, D + 1]` calibrated rows of its prompted classes.
        row_classes: `[R]` int64, the class of every row.
        background: score of the background, if the class list has one.
        advance: gets (pictures done, all).

    Raises:
        DataError: a picture or label map cannot be read, or no patch has a label.
        ConfigError: too many pictures for the memory of this.
    """
    classes = benchmark.class_list
    device = next(segmenter.vision.parameters()).device
    scores, labels, picture, held = [], [], [], 0
    for index in range(len(benchmark)):
        sample = benchmark.sample(index)
        encoded = segmenter.encode(sample.image.to(device))
        found = segmenter.token_scores(encoded.features, text.to(device), row_classes.to(device))
        own = _patch_labels(sample.target, encoded)
        counted = own != benchmark.ignore_index
        values = found.permute(0, 2, 3, 1).flatten(0, 2)[counted.to(device)].logit().cpu()
        if classes.has_background:
            values = F.pad(values, (1, 0), value=float(torch.tensor(background).logit()))
        scores.append(values)
        labels.append(own[counted])
        picture.append(torch.full((len(values),), index))
        held += values.numel()
        if held > MOST:
            raise ConfigError(
                f"masks: {index + 1} of {len(benchmark)} pictures with {len(classes.names)} "
                "classes fill the memory that is meant for this, 1 GiB; give fewer pictures"
            )
        advance(index + 1, len(benchmark))
    patches = LabeledPatches(torch.cat(scores), torch.cat(labels), torch.cat(picture), len(scores))
    shown = len(torch.unique(patches.labels))
    if shown < 2:
        raise DataError(
            f"masks: {len(scores)} pictures show {shown} of the classes; "
            "offsets compare classes, so label pictures that show two or more"
        )
    return patches


def fit_offsets(patches: LabeledPatches, ridge: float = RIDGE) -> Tensor:
    """`[K]` offsets under which the scores tell the classes apart best; no figure on them.

    Minimizes the cross-entropy of `slope * (score - offset)`, averaged over the patches of a class
    and then over the classes, plus `ridge * mean((slope * offset)^2)`, over slope and offsets; it
    is convex in the slope and `slope * offset`. Classes without a patch are left out and get 0.
    """
    present, labels = torch.unique(patches.labels, return_inverse=True)
    scores = patches.scores[:, present]
    weight = labels.bincount().double().reciprocal().float()
    slope = torch.tensor(SLOPE, requires_grad=True)
    shift = torch.zeros(len(present), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slope, shift], max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        logits = scores * slope - shift
        loss = F.cross_entropy(logits, labels, weight) + ridge * shift.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    offsets = torch.zeros(patches.scores.shape[1])
    if float(slope.detach()) > 0:  # else the scores say the opposite of the labels
        offsets[present] = (shift / slope).detach()
    return offsets


def cross_fit(patches: LabeledPatches, seed: int, folds: int = FOLDS) -> FittedOffsets:
    """Offsets from all pictures, and their worth: each picture by offsets fitted without it.

    Args:
        patches: of two pictures or more.
        seed: of the folds.
        folds: parts that are left out in turn; at most as many as there are pictures.

    Raises:
        ConfigError: a single picture.
    """
    folds = min(folds, patches.pictures)
    if folds < 2:
        raise ConfigError(
            "masks: a single picture; what its offsets are worth shows on others only, so give two "
            "or more"
        )
    order = torch.randperm(patches.pictures, generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(len(order)) % folds
    fold = fold_of[patches.picture]
    offsets = torch.stack([fit_offsets(patches.of(fold != number)) for number in range(folds)])
    none = torch.zeros(patches.scores.shape[1])
    return FittedOffsets(
        fit_offsets(patches), patches.mean_iou(none), patches.mean_iou(offsets[fold]), folds
    )


def _patch_labels(target: Tensor, encoded: EncodedImage) -> Tensor:
    """The most frequent of 8 x 8 labels of every patch of every window, `[B * P]` int64."""
    rows, columns = encoded.features.grid
    working = F.interpolate(target[None, None].float(), encoded.image.shape[-2:], mode="nearest")
    labels = []
    for window in encoded.windows:
        fine = F.interpolate(window.crop(working), (8 * rows, 8 * columns), mode="nearest")
        cells = fine[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2)  # [rows, columns, 64]
        labels.append(cells.mode(dim=-1).values.flatten())
    return torch.cat(labels).long()
