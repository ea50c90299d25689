"""A safetensors file of which only some tensors are read, here or on the Hub."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


class TensorFile(Protocol):
    """What both files have."""

    keys: list[str]

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read some of the tensors, in the file's dtypes."""


class LocalTensorFile:
    """A file of this machine.

    Raises:
        FileNotFoundError: it is not there.
        SafetensorError: it is damaged, or lacks a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.keys: list[str] = list(file.keys())

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read some of the tensors; the others stay on the disk."""
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}


class HubTensorFile:
    """A file of a Hub repository; header and wanted tensors are all that is transferred.

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

    def __init__(self, repository: str, name: str, revision: str | None) -> None:
        self.url = hf_hub_url(repository, name, revision=revision)
        (length,) = struct.unpack("<Q", self._bytes(0, 8))
        if length > _LONGEST_HEADER:
            raise OSError(f"{name}: no safetensors file")
        self.start = 8 + length
        self.header: dict[str, Any] = json.loads(self._bytes(8, self.start))
        self.keys = [key for key in self.header if key != "__metadata__"]

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Fetch some of the tensors, a request each."""
        entries, content = {}, b""
        for key in keys:
            first, last = self.header[key]["data_offsets"]
            end = len(content) + last - first
            entries[key] = self.header[key] | {"data_offsets": [len(content), end]}
            content += self._bytes(self.start + first, self.start + last)
        header = json.dumps(entries).encode()
        small: dict[str, Tensor] = load(struct.pack("<Q", len(header)) + header + content)
        return small

    def _bytes(self, first: int, end: int) -> bytes:
        wanted = {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        answer = get_session().get(
            self.url,
            headers=build_hf_headers() | wanted,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        if answer.status_code == 404:
            raise FileNotFoundError(self.url)
        hf_raise_for_status(answer)
        content: bytes = answer.content
        if answer.status_code != 206 or len(content) != end - first:
            raise OSError(f"{self.url}: answers with other bytes than asked for")
        return content
