"""The original's names of pre-extracted features, and their values as fields of the store.

Names: `dino_extraction_v2.py` (images) and `text_features_extraction.py` (annotations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.features.schema import FIXED_DTYPES

Row = Mapping[str, Any]  # an image or an annotation of the original's file
Fields = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]  # the original's name -> shape of one row

IMAGE_NAMES = {  # the original's name -> the store's
    "dino_features": "cls_token",
    "patch_tokens": "patch_tokens",
    "self_attn_maps": "self_attn_maps",
    "avg_self_attn_out": "avg_self_attn_out",
    "disentangled_self_attn": "disentangled_self_attn",
    "second_last_out": "second_last_out",
}
EMBEDDINGS = ("ann_feats", "text_features", "bert-base_features")
CAPTION_NAMES = dict.fromkeys(EMBEDDINGS, "embedding") | {
    "clip_txt_out_tokens": "token_embeddings",
    "text_input_mask": "token_mask",
    "clip_second_last_out": "second_last_tokens",
    "text_argmax": "eot_index",
}


class OriginalFields:
    """Which fields a file has, told by one image and one annotation of it, and their values.

    Args:
        image: an image with features.
        caption: an annotation with features.
        dtype: of the stored features, `float16` or `float32`.
        embedding: the annotations' field that becomes `embedding`; None if they have only one.

    Raises:
        DataError: several embeddings to choose from, or not the one that was chosen.
    """

    def __init__(self, image: Row, caption: Row, dtype: str, embedding: str | None = None) -> None:
        self.dtype = dtype
        found = [name for name in EMBEDDINGS if isinstance(caption.get(name), Tensor)]
        if embedding is None and len(found) > 1:
            raise DataError(
                f"the annotations have {' and '.join(found)}; say which to store: "
                f"embedding={found[0]}"
            )
        if embedding is not None and embedding not in found:
            raise DataError(f"embedding={embedding}: the annotations have {found or 'none'}")
        self.image_shapes = _shapes(image, IMAGE_NAMES)
        self.caption_shapes = _shapes(caption, CAPTION_NAMES)
        for name in found:
            if embedding is not None and name != embedding:
                del self.caption_shapes[name]

    @property
    def shapes(self) -> Shapes:
        """Shape of one row by the store's name of a field."""
        images = {IMAGE_NAMES[name]: shape for name, shape in self.image_shapes.items()}
        captions = {CAPTION_NAMES[name]: shape for name, shape in self.caption_shapes.items()}
        return images | captions

    def image(self, row: Row) -> Fields:
        """Fields of one image, each [1, ...], in stored types.

        Raises:
            ValueError: a field is missing or of another shape; says which.
        """
        return self._fields([row], self.image_shapes, IMAGE_NAMES)

    def captions(self, rows: Sequence[Row]) -> Fields:
        """Fields of m annotations, each [m, ...], in stored types; ValueError as `image`."""
        return self._fields(rows, self.caption_shapes, CAPTION_NAMES)

    def nothing(self) -> tuple[Fields, Fields]:
        """Both kinds of fields with no row."""
        return (
            self._fields([], self.image_shapes, IMAGE_NAMES),
            self._fields([], self.caption_shapes, CAPTION_NAMES),
        )

    def _fields(self, rows: Sequence[Row], shapes: Shapes, names: Mapping[str, str]) -> Fields:
        fields: Fields = {}
        for name, shape in shapes.items():
            dtype = FIXED_DTYPES.get(names[name], self.dtype)
            fields[names[name]] = stored = np.empty((len(rows), *shape), dtype)
            for target, row in enumerate(rows):
                values = _values(row, name, shape)
                with np.errstate(over="ignore"):  # the writer names what does not fit in float16
                    stored[target] = logits(values) if name == "self_attn_maps" else values
        return fields


def logits(maps: NDArray[Any]) -> NDArray[Any]:
    """Attention maps [H, P] as logits.

    With `--extract_disentangled_self_attn` the original stores maps behind the softmax, otherwise
    raw ones (verified, see goldens). The logarithm undoes a softmax up to a constant per head,
    which no softmax over patches sees, neither of one head nor of a weighted mean of heads.
    """
    positive = bool((maps >= 0).all())
    if not positive or not np.allclose(maps.sum(axis=-1, dtype=np.float64), 1, atol=1e-2):
        return maps
    found: NDArray[Any] = np.log(np.maximum(maps, np.finfo(np.float32).tiny, dtype=np.float32))
    return found


def _shapes(row: Row, names: Mapping[str, str]) -> Shapes:
    return {name: tuple(row[name].shape) for name in names if isinstance(row.get(name), Tensor)}


def _values(row: Row, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    value = row.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"has no {name}")
    if tuple(value.shape) != shape:
        raise ValueError(f"has {name} {list(value.shape)}, the first one {list(shape)}")
    return (value.float() if value.is_floating_point() else value).numpy()  # bfloat16 too
