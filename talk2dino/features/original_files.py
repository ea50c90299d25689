"""Features that the original extracted: `.pth` files or tars, as fields of the store."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.datasets.tars import Member, TarReader, tar_members
from talk2dino.errors import DataError
from talk2dino.features.store.schema import FIXED_DTYPES

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


class OriginalSamples(Protocol):
    """Images with their annotations, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        """The image and its annotations, at least one."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this input from another."""


class FeatureFile:
    """A COCO-like dict of `images` and `annotations` that carry tensors, saved by `torch.save`.

    The file is memory-mapped: a tensor is read when it is converted. Images without an annotation
    are left out, as the original's dataset does; annotations keep their order within an image.

    Raises:
        DataError: no such file, not loadable without pickled code, not of that form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"input={path}: no such file")
        content = load_tensors(path, f"input={path}")
        for key in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise DataError(
                    f"input={path}: no list {key!r}; expected what the original's "
                    "dino_extraction_v2.py and text_features_extraction.py write"
                )
        grouped: dict[Any, list[Row]] = defaultdict(list)
        for row in _checked(path, content["annotations"], ("id", "image_id", "caption")):
            grouped[row["image_id"]].append(row)
        images = list(_checked(path, content["images"], ("id", "file_name")))
        known = {row["id"] for row in images}
        for image_id, rows in grouped.items():
            if image_id not in known:
                raise DataError(
                    f"input={path}: annotation {rows[0]['id']} names image {image_id}, which is "
                    "not in its images"
                )
        self._samples = [(row, grouped[row["id"]]) for row in images if row["id"] in grouped]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        return self._samples[index]

    def fingerprint(self) -> dict[str, Any]:
        """Name and size of the file."""
        return {"file": self.path.name, "bytes": self.path.stat().st_size}


class FeatureTars:
    """Tars that the original writes with `--write_as_wds`: a `.pth` per image with one caption.

    Every sample is a dict of the image's and the annotation's keys together (`image_id` is the
    image's id). The last sample of a tar counts like the others.

    Raises:
        DataError: a tar that is cut off, or no `.pth` in any.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = tars
        self._reader = TarReader(tars)
        self._members: list[tuple[int, Member]] = [
            (tar, member)
            for tar, path in enumerate(tars)
            for member in tar_members(path)
            if member.name.endswith(".pth")
        ]
        if not self._members:
            raise DataError(
                f"input={tars[0]}: no .pth in it; for images use extract source=webdataset"
            )

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        tar, member = self._members[index]
        where = f"{self.tars[tar]}: {member.name}"
        try:
            data = self._reader.read(tar, member.offset, member.size)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        row = load_tensors(io.BytesIO(data), where)
        if not isinstance(row, dict) or not {"id", "image_id", "caption"} <= row.keys():
            raise DataError(f"{where}: expected a dict with id, image_id and caption")
        name = str(row.get("file_name", Path(member.name).stem))
        return row | {"id": row["image_id"], "file_name": name}, [row]

    def fingerprint(self) -> dict[str, Any]:
        """Names and sizes of the tars."""
        return {"tars": {path.name: path.stat().st_size for path in self.tars}}


def load_tensors(file: Path | BinaryIO, where: str) -> Any:
    """What `torch.save` wrote, tensors and plain values only; a path is memory-mapped.

    Raises:
        DataError: damaged, or holds objects that only running foreign code could restore.
    """
    try:
        if isinstance(file, Path) and zipfile.is_zipfile(file):  # torch before 1.6 wrote others
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{where}: cannot be loaded safely ({reason[:120]})") from error


def _checked(path: Path, rows: list[Any], keys: tuple[str, ...]) -> Iterator[Row]:
    kind = "images" if "file_name" in keys else "annotations"
    for number, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"input={path}: {kind}[{number}] has no {missing[0]}")
        yield row
