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
from talk2dino.alignment.retrieval import check_owners, retrieval_from_scores
from talk2dino.alignment.similarity.base import Similarity
from talk2dino.errors import Advance, DataError, StoreError
from talk2dino.features.store.reader import FeatureStore
from talk2dino.finding.scan import PATCHES, Scan, picture_scores, searched_field
from talk2dino.segmentation.memory import GB, machine_memory

IMAGES = 64  # compared at once as in training
BYTES = 10  # for each caption and image: a score, its copy, two comparisons


def check_recall(store: FeatureStore, projection: Projection, similarity: Similarity) -> None:
    """Refuse what cannot be compared, before encoders are loaded. Arguments as of `recall`.

    Raises:
        ConfigError: projection and similarity do not fit together.
        StoreError: no captions, or a field that is not stored.
        DataError: an image without one, or more scores than the machine has memory for.
    """
    captions, images = len(store.captions), len(store.images)
    if not captions:
        raise StoreError(f"store={store.path}: holds no captions, so recall=true has no queries")
    check_combination(projection, similarity, "val_similarity")
    store.require(captions=(*caption_fields(projection, similarity), "image_row"))
    for name in image_fields(projection, similarity, store.images.fields):
        if name not in store.images:
            raise StoreError(
                f"store={store.path}: holds no {name}, which val_similarity compares; choose "
                "another, for instance val_similarity=pooled"
            )
    check_owners(torch.from_numpy(store.captions["image_row"][:]), images)
    needed, there = BYTES * captions * images, machine_memory()
    if needed > there:
        raise DataError(
            f"recall=true: {captions} captions by {images} images take {needed / GB:.1f} GB of "
            f"memory, this machine has {there / GB:.1f} GB; use a store of fewer images "
            "(source.limit=5000)"
        )


@torch.no_grad()
def recall(
    store: FeatureStore,
    projection: Projection,
    similarity: Similarity,
    best: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Recall of all captions of a store, from their stored embeddings.

    Scores of all captions and images are held, up to `captions * images * BYTES` with ranks.

    Args:
        store: with caption embeddings.
        projection: ψ of the encoders of the store.
        similarity: of the training's validation.
        best: see `best_pictures`.
        advance: gets (images compared, all); the store is read once for each of the two kinds.

    Returns:
        For `search` and `training` what `retrieval_from_scores` gives. Errors as `check_recall`.
    """
    check_recall(store, projection, similarity)
    names = caption_fields(projection, similarity)
    fields = image_fields(projection, similarity, store.images.fields)
    device = next(projection.parameters()).device
    read = {name: torch.from_numpy(store.captions[name][:]).to(device) for name in names}
    text, mask = projected_text(_single(read), projection, similarity)
    images, dense = len(store.images), searched_field(store) == PATCHES
    owners = torch.from_numpy(store.captions["image_row"][:])
    scored = torch.empty(len(text), images)
    rows = F.normalize(text.float(), dim=-1, eps=1e-6)
    for start, scores in Scan(store, rows, torch.arange(len(rows)), projection):
        some = picture_scores(scores, best if dense else 1).cpu()
        scored[:, start : start + some.shape[1]] = some
        advance(start + some.shape[1], 2 * images)
    searched = retrieval_from_scores(scored.__getitem__, owners, images)
    for start in range(0, images, IMAGES):
        chosen = np.arange(start, min(start + IMAGES, images))
        batch = {name: torch.from_numpy(store.images[name][chosen]).to(device) for name in fields}
        visual = projected_visual(_single(batch), projection, similarity)
        masks = () if mask is None else (mask,)
        scored[:, start : start + len(chosen)] = similarity.scores(text, visual, *masks).cpu()
        advance(images + start + len(chosen), 2 * images)
    trained = retrieval_from_scores(scored.__getitem__, owners, images)
    return {"search": searched, "training": trained}


def _single(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Features in the precision that the projection computes with."""
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
