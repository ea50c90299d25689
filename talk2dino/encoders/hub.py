"""The Hugging Face Hub: its checkpoints, and what to do when it cannot be reached."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session

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
        with cached_if_unreachable():
            return Path(hf_hub_download(str(location), WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={location}: no such file, and the Hub gives no {WEIGHTS} for it "
            f"({type(error).__name__})"
        ) from error


@contextmanager
def cached_if_unreachable(seconds: float = 5.0) -> Iterator[None]:
    """Use cached files only while the Hub does not answer one short request.

    Without this, a machine that is offline waits through five retries for every file name that a
    library tries: a minute for timm, several for sentence-transformers.

    Args:
        seconds: how long the Hub may take to answer.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(seconds)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(seconds: float) -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # requests and httpx, which take turns here, share no base class
        return False
    return True


def upload_folder(folder: Path, repo_id: str, private: bool, message: str) -> str:
    """Upload a folder as one commit to a repository of the Hub, created when needed.

    Needs a login: `huggingface-cli login`, or the environment variable HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the Hub refuses or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"push_to_hub={repo_id}: the Hub did not take it ({reason}); log in with HF_TOKEN=…, "
            "and check the name"
        ) from error
    return str(done.commit_url)
