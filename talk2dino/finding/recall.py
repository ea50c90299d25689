"""How well captions find their own pictures: by search, and as training measures it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from talk2dino.alignment.inputs import (
    caption_fields,
    check_combination,
    image_fields,
    projected_text,
    projected_visual,
)
from talk2dino.alignment.projection import Projection
from talk2dino.alignment.retrieval import retrieval_from_scores
from talk2dino.alignment.similarity.base import Similarity
from talk2dino.errors import Advance
from talk2dino.features.store.reader import FeatureStore
from talk2dino.finding.scan import PATCHES, Scan, picture_scores, searched_field

IMAGES = 64  # compared at once as in training


@torch.no_grad()
def recall(
    store: FeatureStore,
    projection: Projection,
    similarity: Similarity,
    best: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Recall of all captions of a store, from their stored embeddings.

    Scores of all captions and images are held, up to `captions * images * 14` bytes with ranks.

    Args:
        store: with caption embeddings.
        projection: ψ of the encoders of the store.
        similarity: of the training's validation.
        best: see `best_pictures`.
        advance: gets (images compared, all); the store is read once for each of the two kinds.

    Returns:
        For `search` and `training` what `retrieval_from_scores` gives.

    Raises:
        StoreError: the store lacks a field.
        DataError: an image without a caption.
        ConfigError: projection and similarity do not fit together.
    """
    check_combination(projection, similarity, "val_similarity")
    names = caption_fields(projection, similarity)
    store.require(captions=(*names, "image_row"))
    fields = image_fields(projection, similarity, store.images.fields)
    store.require(images=fields)
    device = next(projection.parameters()).device
    read = {name: torch.from_numpy(store.captions[name][:]).to(device) for name in names}
    text, mask = projected_text(_single(read), projection, similarity)
    images, dense = len(store.images), searched_field(store) == PATCHES
    owners = torch.from_numpy(store.captions["image_row"][:])
    found, trained = torch.empty(2, len(text), images)
    rows = F.normalize(text.float(), dim=-1, eps=1e-6)
    for start, scores in Scan(store, rows, torch.arange(len(rows)), projection):
        some = picture_scores(scores, best if dense else 1).cpu()
        found[:, start : start + some.shape[1]] = some
        advance(start + some.shape[1], 2 * images)
    for start in range(0, images, IMAGES):
        chosen = np.arange(start, min(start + IMAGES, images))
        batch = {name: torch.from_numpy(store.images[name][chosen]).to(device) for name in fields}
        visual = projected_visual(_single(batch), projection, similarity)
        masks = () if mask is None else (mask,)
        trained[:, start : start + len(chosen)] = similarity.scores(text, visual, *masks).cpu()
        advance(images + start + len(chosen), 2 * images)
    return {
        name: retrieval_from_scores(scores.__getitem__, owners, images)
        for name, scores in (("search", found), ("training", trained))
    }


def _single(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Features in the precision that the projection computes with."""
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
