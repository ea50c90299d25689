"""A random subset of each image's patches, decided by the image alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SEED = 0x7A1D  # another one would choose other patches: part of the store's bytes
_64_BITS = (1 << 64) - 1


def patch_subset(image_ids: Sequence[int], patches: int, count: int) -> NDArray[np.int64]:
    """Choose `count` of `patches` patches of each image, uniformly: [B, count], ascending.

    Depends on the image's id only, so ranks, batches and restarts agree; drawn from raw bits,
    which NumPy keeps the same in all versions.
    """
    chosen = np.empty((len(image_ids), count), np.int64)
    for row, image_id in enumerate(image_ids):
        keys = np.random.PCG64([_SEED, image_id & _64_BITS]).random_raw(patches)
        chosen[row] = np.sort(np.argsort(keys, kind="stable")[:count])
    return chosen
