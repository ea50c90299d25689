"""The Hugging Face Hub: checkpoints and whole files, single tensors, what its caches hold."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]
from safetensors.torch import load
from torch import Tensor

from talk2dino.errors import CheckpointError
from talk2dino.files import user_path

WEIGHTS = "projection.safetensors"
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def resolve_checkpoint(location: str | Path) -> Path:
    """Return a local file for a path, a folder holding `projection.safetensors`, or a Hub id.

    Raises:
        CheckpointError: nothing is there, or the download failed.
    """
    path = user_path(location)
    if path.is_dir():
        for inside in (path / WEIGHTS, path / "checkpoints" / "last.ckpt"):
            if inside.is_file():
                return inside
        raise CheckpointError(
            f"checkpoint={location}: the folder holds no {WEIGHTS}, nor the "
            "original's config.json and model.safetensors"
        )
    if path.is_file():
        return path
    named = split_hub_id(str(location))
    if named is None:
        raise CheckpointError(
            f"checkpoint={location}: no such file; give a .safetensors, .ckpt or .pth file, a run "
            "folder, or a Hub id like org/name"
        )
    try:
        return hub_file(named[0], WEIGHTS, named[1])
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={location}: no such file, and the Hub gives no {WEIGHTS} and no model in "
            f"the original's layout for it ({type(error).__name__})"
        ) from error


def split_hub_id(location: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name` or `org/name@revision`; None for everything else."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", location)
    return None if found is None or Path(found[1]).suffix else (found[1], found[2])


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """Download a file of a Hub repository, or find it in the cache.

    Raises:
        FileNotFoundError: it is not there, or not in the cache of a machine that is offline.
        HfHubHTTPError: the Hub refuses, for instance a private repository.
        OSError: the connection broke.
    """
    here = in_cache(name, repository, revision)
    if here is not None and here.parent.name == revision:  # a commit never changes
        return here
    try:
        with cached_if_unreachable():
            return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no {name}") from error


def in_cache(name: str, repository: str, revision: str | None = None) -> Path | None:
    """A file of a Hub repository if the cache has it."""
    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


class HubTensorFile:
    """Reads as `safetensors.safe_open` does; header and wanted tensors are all that is transferred.

    The Hub's own client makes the requests, so its address and the login count as in a download.

    Args:
        repository: `org/name`.
        name: of the file.
        revision: branch, tag or commit.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: the answer is not the bytes that were asked for.
        Exception: whatever the client's HTTP library raises; it has two, which share no base class.
    """

    def __init__(self, repository: str, name: str, revision: str) -> None:
        self.url = hf_hub_url(repository, name, revision=revision)
        (length,) = struct.unpack("<Q", self._bytes(0, 8))
        if length > _LONGEST_HEADER:
            raise OSError(f"{name}: no safetensors file")
        self.start = 8 + length
        self.header: dict[str, Any] = json.loads(self._bytes(8, self.start))

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return [key for key in self.header if key != "__metadata__"]

    def get_tensor(self, key: str) -> Tensor:
        """Fetch a tensor, in the file's dtype."""
        first, end = self.header[key]["data_offsets"]
        entry = self.header[key] | {"data_offsets": [0, end - first]}
        header = json.dumps({key: entry}).encode()
        content = self._bytes(self.start + first, self.start + end)
        tensor: Tensor = load(struct.pack("<Q", len(header)) + header + content)[key]
        return tensor

    def _bytes(self, first: int, end: int) -> bytes:
        wanted = {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        answer = get_session().get(
            self.url, headers=build_hf_headers() | wanted, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        if answer.status_code == 404:
            raise FileNotFoundError(self.url)
        hf_raise_for_status(answer)
        content: bytes = answer.content
        if answer.status_code != 206 or len(content) != end - first:
            raise OSError(f"{self.url}: answers with other bytes than asked for")
        return content


@contextmanager
def cached_if_unreachable() -> Iterator[None]:
    """Use cached files only while the Hub does not answer one short request.

    Without this, a machine that is offline waits through five retries for every file name that a
    library tries: a minute for timm, several for sentence-transformers.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
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
    from huggingface_hub.errors import HFValidationError

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


def in_hub_cache(repository: str) -> bool:
    """Whether the Hub's cache holds a snapshot of a repository with weights in it."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    endings = (".safetensors", ".bin", ".pt", ".pth")
    return any(path.suffix in endings for path in folder.glob("snapshots/*/*"))


def cached_names() -> list[str]:
    """Repositories in the Hub's cache and files in the cache of torch.hub."""
    hub = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = ["/".join(path.name.split("--")[1:]) for path in hub]
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    files = sorted(path.name for path in checkpoints.glob("*") if path.is_file())
    return [f"Hub {name}" for name in names] + [f"torch.hub {name}" for name in files]
