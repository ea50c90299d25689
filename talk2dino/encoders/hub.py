"""Checkpoints that live on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from talk2dino.errors import CheckpointError

WEIGHTS = "projection.safetensors"


def resolve_checkpoint(location: str | Path) -> Path:
    """Return a local file for a path, a folder holding `projection.safetensors`, or a Hub id.

    Raises:
        CheckpointError: nothing is there, or the download failed.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        for inside in (path / WEIGHTS, path / "checkpoints" / "last.ckpt"):
            if inside.is_file():
                return inside
        raise CheckpointError(f"checkpoint={location}: the folder holds no {WEIGHTS}")
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)) or path.suffix:
        raise CheckpointError(
            f"checkpoint={location}: no such file; give a .safetensors, .ckpt or .pth file, a run "
            "folder, or a Hub id like org/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(location), WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={location}: no such file, and the Hub gives no {WEIGHTS} for it "
            f"({type(error).__name__})"
        ) from error
