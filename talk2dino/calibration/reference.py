"""A few thousand patch tokens drawn over many pictures, from a feature store or from pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.datasets.pictures import is_picture, read_image, unread
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import Advance, CheckpointError, ConfigError, DataError, check_number
from talk2dino.features.store.reader import FeatureStore
from talk2dino.segmentation.segmenter import Segmenter

FIELD = "patch_tokens"
# patches of a picture, if there are enough pictures: those of one are alike, encoding takes time
STORED, ENCODED = 2, 8
LEAST, MOST = 100, 1 << 16  # tokens of a reference


@dataclass(frozen=True, eq=False)
class Drawn:
    """Patch tokens and how they were drawn.

    Attributes:
        tokens: `[N, D]` float16, on the CPU.
        pictures: how many of them gave patches.
        picture: `[N]` int64, which of these pictures each token is of.
        store_rows: `[pictures]` int64, their rows in the store; None if drawn from a folder.
    """

    tokens: Tensor = field(repr=False)
    pictures: int
    picture: Tensor = field(repr=False)
    store_rows: NDArray[np.int64] | None = field(default=None, repr=False)


def draw_from_store(
    store: FeatureStore,
    vision: TimmVisionEncoder,
    count: int,
    seed: int,
    advance: Advance = lambda done, total: None,
) -> Drawn:
    """Draw from the patch tokens of a store.

    Args:
        store: with dense features.
        vision: the encoder that the store must be of.
        count: N.
        seed: decides which; the same store and seed give the same tokens.
        advance: gets (pictures read, all).

    Raises:
        StoreError: no patch tokens are stored.
        CheckpointError: the store is of another encoder.
        ConfigError: `count` is out of its range, or the store holds fewer patches.
    """
    rows, patches, _ = store.images[FIELD].shape
    require_encoder(store, vision, "extract with that, or give images=DIR")
    chosen, each, random = _plan(rows, rows * patches, STORED, count, seed, f"store={store.path}")
    parts = []
    for done, row in enumerate(chosen):
        places = random.choice(patches, each[done], replace=False)
        parts.append(store.images[FIELD][int(row)][np.sort(places)])
        advance(done + 1, len(chosen))
    return Drawn(_joined(parts), len(chosen), _numbered(each), chosen)


def require_encoder(store: FeatureStore, vision: TimmVisionEncoder, fix: str) -> None:
    """Refuse a store of another encoder, or an unnamed one; weights count (CheckpointError)."""
    theirs = store.vision
    if theirs is None or theirs.weights_sha256 != state_dict_digest(vision.model):
        named = "an encoder that it does not name" if theirs is None else theirs.name
        raise CheckpointError(
            f"store={store.path}: its features are of {named}, not of this checkpoint's "
            f"{vision.name} with the same weights; {fix}"
        )
    vision.refuse_other_layers(theirs.spec, f"store={store.path}")


def draw_from_pictures(
    folder: Path,
    segmenter: Segmenter,
    count: int,
    seed: int,
    advance: Advance = lambda done, total: None,
) -> Drawn:
    """Draw from pictures of a folder and its subfolders, cut and encoded as for segmentation.

    Arguments and errors as `draw_from_store`; the segmenter decides sizes and device.

    Raises:
        DataError: no such folder, no pictures in it, or one that cannot be read.
        ConfigError: `count` is out of its range, or the pictures have fewer patches.
    """
    files = pictures_below(folder)
    side = segmenter.protocol.input_size // getattr(segmenter.vision, "patch_size", 1)
    chosen, each, random = _plan(
        len(files), len(files) * side**2, ENCODED, count, seed, f"images={folder}"
    )
    device = next(segmenter.vision.parameters()).device
    parts = []
    for done, index in enumerate(chosen):
        features = segmenter.encode(read_image(files[index]).to(device)).features
        tokens = features.patch_tokens.flatten(0, 1)  # of all windows
        places = random.choice(len(tokens), each[done], replace=False)
        parts.append(tokens[np.sort(places)].cpu().numpy())
        advance(done + 1, len(chosen))
    return Drawn(_joined(parts), len(chosen), _numbered(each))


def pictures_below(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, in the order of their paths.

    Raises:
        DataError: no such folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise DataError(f"images={folder}: no such folder")
    found = sorted(folder.rglob("*"))
    if pictures := [path for path in found if is_picture(path)]:
        return pictures
    endings = sorted({path.suffix.lower() for path in found if path.is_file() and path.suffix})
    why = f" ({unread(endings)})" if endings else ""
    raise DataError(f"images={folder}: no pictures in this folder{why}")


def _plan(
    pictures: int, patches: int, most: int, count: int, seed: int, where: str
) -> tuple[NDArray[np.int64], list[int], np.random.Generator]:
    """Which pictures, how many patches of each (`most`), and the random numbers to go on with."""
    check_number("tokens", count, LEAST, MOST)
    check_number("seed", seed, 0, 2**32 - 1)
    if patches < count:
        raise ConfigError(
            f"tokens={count}: {where} holds {pictures} pictures with {patches} patches; use fewer "
            "tokens or more pictures"
        )
    random = np.random.default_rng(seed)
    used = min(pictures, ceil(count / min(most, patches // pictures)))  # few, of small pictures
    chosen = np.sort(random.choice(pictures, used, replace=False))
    each = [count // used + (place < count % used) for place in range(used)]
    return chosen, each, random


def _numbered(each: Sequence[int]) -> Tensor:
    return torch.arange(len(each)).repeat_interleave(torch.tensor(each))


def _joined(parts: Sequence[NDArray[np.floating]]) -> Tensor:
    tokens = torch.from_numpy(np.concatenate(parts)).half()
    if not tokens.isfinite().all():
        raise DataError("patch tokens beyond the range of float16, or not a number")
    return tokens
