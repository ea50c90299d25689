"""`convert features|tars|archive|unarchive|verify`: feature stores made, copied and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talk2dino.cli import require_output_folder
from talk2dino.conversions.progress import progress
from talk2dino.features.archive import archive_store
from talk2dino.features.from_original import convert_features
from talk2dino.features.original_samples import FeatureFile, FeatureTars, OriginalSamples
from talk2dino.features.schema import Manifest
from talk2dino.features.store import FeatureStore
from talk2dino.features.tar_files import expand_tars
from talk2dino.features.verify import verify_store

Spec = dict[str, Any]


def features(
    input: str,
    store: str,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = 1024,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Convert the original's `.pth` of pre-extracted features; see `convert_features`."""
    samples = FeatureFile(Path(input).expanduser())
    _fill(samples, store, split, dtype, images_per_shard, embedding, vision, text)


def tars(
    input: str,
    store: str,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = 1024,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Convert the original's tars (brace range, glob or folder) of features; see `features`."""
    samples = FeatureTars(expand_tars(input, "input"))
    _fill(samples, store, split, dtype, images_per_shard, embedding, vision, text)


def archive(store: str, output: str) -> None:
    """Write a compressed copy of a store; see `archive_store`."""
    _copy(store, output, compressed=True)


def unarchive(store: str, output: str) -> None:
    """Write a contiguous copy of an archive; see `archive_store`."""
    _copy(store, output, compressed=False)


def verify(store: str) -> None:
    """Read all of a store; print every bad shard and exit with status 1 if there is one."""
    folder = Path(store).expanduser()
    with progress("verify") as advance:
        problems = verify_store(folder, advance)
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(1)
    opened = FeatureStore(folder)
    print(
        f"{folder}: sound, {len(opened.manifest.shards)} shards, {len(opened.images)} images, "
        f"{len(opened.captions)} captions"
    )


def _fill(
    samples: OriginalSamples,
    store: str,
    split: str,
    dtype: str,
    images_per_shard: int,
    embedding: str | None,
    vision: Spec | None,
    text: Spec | None,
) -> None:
    folder = require_output_folder(Path(store).expanduser(), "store")
    with progress("convert") as advance:
        manifest = convert_features(
            samples,
            folder,
            split=split,
            dtype=dtype,
            images_per_shard=images_per_shard,
            embedding=embedding,
            vision=vision,
            text=text,
            advance=advance,
        )
    for kind, spec in (("vision", vision), ("text", text)):
        print(f"{kind}: {spec['name'] if spec else f'not named; say it with {kind}=…'}")
    for table, names in manifest.fields.items():
        print(f"{table}: {', '.join(names)}")
    if manifest.skipped:
        print(
            f"{manifest.skipped} images without features were skipped; the list is "
            f"{folder / f'{split}-skipped.jsonl'}"
        )
    print(f"{folder}: {_sizes(manifest)}")


def _copy(store: str, output: str, compressed: bool) -> None:
    source, target = Path(store).expanduser(), Path(output).expanduser()
    before = Manifest.read(source)
    require_output_folder(target, "output")
    with progress("archive" if compressed else "unarchive") as advance:
        manifest = archive_store(source, target, compressed, advance)
    print(f"{source}: {_sizes(before)}")
    print(f"{target}: {_sizes(manifest)}")


def _sizes(manifest: Manifest) -> str:
    shards = manifest.shards
    images, captions = sum(s.images for s in shards), sum(s.captions for s in shards)
    size = sum(shard.bytes for shard in shards) / 1e6
    return f"{images} images, {captions} captions, {len(shards)} shards, {size:.1f} MB"
