"""The list of images that could not be read: one per shard while it grows, one for the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from talk2dino.atomic import replacing
from talk2dino.features.writer import PARTS


def write_skipped(store: Path, split: str, shard: int, items: Sequence[Mapping[str, Any]]) -> None:
    """Note what shard `shard` leaves out; an older list of it goes."""
    file = store / PARTS / f"{split}-{shard:05d}.skipped"
    file.unlink(missing_ok=True)
    if items:
        with replacing(file) as path:
            path.write_text("".join(json.dumps(item) + "\n" for item in items))


def merge_skipped(store: Path, split: str) -> None:
    """Write `{split}-skipped.jsonl` beside the manifest, if any shard left something out."""
    lists = sorted((store / PARTS).glob(f"{split}-*.skipped"))
    if lists:
        # Two ranks may finish at once and both write it.
        with replacing(store / f"{split}-skipped.jsonl", shared=True) as path:
            path.write_text("".join(part.read_text() for part in lists))
