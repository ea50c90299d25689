"""Features that the original extracted, `.pth` files or tars, written as a feature store."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.datasets.captions import Entry
from talk2dino.datasets.tars import Member, read_member, tar_members
from talk2dino.encoders.weights import load_tensors
from talk2dino.errors import Advance, ConfigError, DataError, StoreError
from talk2dino.features.store.schema import (
    FIXED_DTYPES,
    MANIFEST,
    EncoderInfo,
    Manifest,
    VisionInfo,
)
from talk2dino.features.store.shard_writer import ShardRows
from talk2dino.features.store.writer import (
    IMAGES_PER_SHARD,
    finish_manifest,
    open_for_append,
    write_rows,
)
from talk2dino.files import file_digest

Row = Mapping[str, Any]  # an image or an annotation of the original's file
Spec = Mapping[str, Any]
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


def convert_features(
    samples: OriginalSamples,
    store: Path,
    *,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = IMAGES_PER_SHARD,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
    advance: Advance = lambda done, total: None,
) -> Manifest:
    """Write the original's features into `store`; started again, it continues.

    Shard k holds samples k·n … (k+1)·n − 1. An image that lacks a feature (the original leaves
    images that it could not read without) is skipped and listed in `{split}-skipped.jsonl`.

    Args:
        samples: the original's file or tars.
        store: folder to fill.
        split: first part of the shards' names.
        dtype: of the stored features, `float16` or `float32`.
        images_per_shard: images per shard; one shard is in memory at a time.
        embedding: the annotations' field that becomes `embedding`, if they have several.
        vision: spec of the vision encoder, for the manifest; its weights stay unnamed.
        text: spec of the text encoder, likewise.
        advance: called with (images done, images in all).

    Returns:
        The manifest.

    Raises:
        StoreError: `store` holds a store, or was begun with other settings.
        WriteError: it cannot be written.
        DataError: no features, or an annotation without them.
    """
    if (store / MANIFEST).exists():
        raise StoreError(f"store={store}: already holds a store; delete it or use another folder")
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard={images_per_shard}; use 1 or more")
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype={dtype!r}; choose float16 or float32")
    fields = OriginalFields(*_complete_sample(samples), dtype, embedding)
    settings = {
        "source": samples.fingerprint(),
        "dtype": dtype,
        "images_per_shard": images_per_shard,
        "embedding": embedding,
        "vision": dict(vision or {}),
        "text": dict(text or {}),
    }
    done = open_for_append(store, settings, split)
    starts = range(0, len(samples), images_per_shard)
    for index, start in enumerate(starts):
        stop = min(start + images_per_shard, len(samples))
        if index not in done:
            write_rows(store, index, _rows(samples, range(start, stop), fields), split, dtype)
        advance(stop, len(samples))
    return finish_manifest(
        store,
        shards=len(starts),
        split=split,
        vision=_vision_info(vision, fields),
        text=_text_info(text, fields),
    )


def _complete_sample(samples: OriginalSamples) -> tuple[Row, Row]:
    """The first image with features and its first annotation; a DataError if there is none."""
    for index in range(len(samples)):
        image, captions = samples[index]
        if IMAGE_NAMES.keys() & image.keys():
            if CAPTION_NAMES.keys() & captions[0].keys():
                return image, captions[0]
            raise DataError(
                f"input: annotation {captions[0]['id']} has none of "
                f"{', '.join(CAPTION_NAMES)}; run the original's text_features_extraction.py"
            )
    raise DataError(
        f"input: none of {len(samples)} images has any of {', '.join(IMAGE_NAMES)}; run the "
        "original's dino_extraction_v2.py"
    )


def _rows(samples: OriginalSamples, positions: range, fields: OriginalFields) -> ShardRows:
    rows = ShardRows(len(positions))
    # A shard whose images are all skipped has the fields of the others too.
    rows.add_images([], fields.of_images([]))
    rows.add_caption_fields(fields.of_captions([]))
    for index in positions:
        image, captions = samples[index]
        name = str(image["file_name"])
        try:
            values = fields.of_images([image])
        except ValueError as error:
            rows.skipped.append({"index": index, "file_name": name, "reason": str(error)})
            continue
        texts = tuple((_number(row["id"], index), str(row["caption"])) for row in captions)
        rows.add_images([Entry(_number(image["id"], index), name, texts)], values)
        try:
            rows.add_caption_fields(fields.of_captions(captions))
        except ValueError as error:
            raise DataError(f"input: an annotation of image {image['id']} {error}") from error
    return rows


def _number(value: object, position: int) -> int:
    """An id as a number: COCO's are; keys such as `000000012` become one, others the position."""
    if isinstance(value, str) and not (value.isdecimal() and len(value) < 19):
        return position
    return int(value) if isinstance(value, (int, str)) else position


def _vision_info(spec: Spec | None, fields: OriginalFields) -> VisionInfo | None:
    if spec is None:
        return None
    shapes = fields.image_shapes
    widths = [shape[-1] for name, shape in shapes.items() if name != "self_attn_maps"]
    heads = [shapes[n][0] for n in ("disentangled_self_attn", "self_attn_maps") if n in shapes]
    return VisionInfo(
        name=str(spec["name"]),
        embed_dim=next(iter(widths), 0),
        spec=dict(spec),
        image_size=int(spec.get("image_size", 0)),
        num_heads=next(iter(heads), 0),
    )


def _text_info(spec: Spec | None, fields: OriginalFields) -> EncoderInfo | None:
    if spec is None:
        return None
    shapes = fields.caption_shapes
    widths = [shapes[n][-1] for n in (*EMBEDDINGS, "clip_txt_out_tokens") if n in shapes]
    return EncoderInfo(name=str(spec["name"]), embed_dim=next(iter(widths), 0), spec=dict(spec))


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

    def of_images(self, rows: Sequence[Row]) -> Fields:
        """Fields of n images, each [n, ...], in stored types.

        Raises:
            ValueError: a field is missing or of another shape; says which.
        """
        return self._fields(rows, self.image_shapes, IMAGE_NAMES)

    def of_captions(self, rows: Sequence[Row]) -> Fields:
        """Fields of m annotations, each [m, ...], in stored types; ValueError as `of_images`."""
        return self._fields(rows, self.caption_shapes, CAPTION_NAMES)

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

    With `--extract_disentangled_self_attn` the original stores maps after the softmax, otherwise
    raw ones (verified on its own output). The logarithm undoes a softmax up to a constant per head,
    which changes no softmax over patches, neither of one head nor of a weighted mean of heads.
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
        if len(known) < len(images):
            ids = [row["id"] for row in images]
            twice = next(one for one in ids if ids.count(one) > 1)
            raise DataError(f"input={path}: image id {twice} occurs twice; make the ids unique")
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
        """Name and size of the file, and a digest of the checksums that it keeps of its parts."""
        plain = {"file": self.path.name, "bytes": self.path.stat().st_size}
        if not zipfile.is_zipfile(self.path):  # of torch before 1.6
            return {**plain, "content": file_digest(self.path)[:16]}
        with zipfile.ZipFile(self.path) as file:
            parts = [(part.filename, part.file_size, part.CRC) for part in file.infolist()]
        return {**plain, "content": sha256(repr(parts).encode()).hexdigest()[:16]}


class FeatureTars:
    """Tars that the original writes with `--write_as_wds`: a `.pth` per image with one caption.

    Every sample is a dict of the image's and the annotation's keys together (`image_id` is the
    image's id). The last sample of a tar counts like the others.

    Raises:
        DataError: a tar that is cut off, or no `.pth` in any.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = tars
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
            data = read_member(self.tars[tar], member.offset, member.size)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        row = load_tensors(io.BytesIO(data), where)
        if not isinstance(row, dict) or not {"id", "image_id", "caption"} <= row.keys():
            raise DataError(f"{where}: expected a dict with id, image_id and caption")
        name = str(row.get("file_name", Path(member.name).stem))
        return row | {"id": row["image_id"], "file_name": name}, [row]

    def fingerprint(self) -> dict[str, Any]:
        """Names and sizes of the tars, and a digest of the headers, which have times."""
        headers = sha256()
        for tar, member in self._members:
            headers.update(read_member(self.tars[tar], member.offset - 512, 512))
        sizes = {path.name: path.stat().st_size for path in self.tars}
        return {"tars": sizes, "content": headers.hexdigest()[:16]}


def _checked(path: Path, rows: list[Any], keys: tuple[str, ...]) -> Iterator[Row]:
    kind = "images" if "file_name" in keys else "annotations"
    for number, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"input={path}: {kind}[{number}] has no {missing[0]}")
        yield row
