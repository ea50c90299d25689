"""A safetensors file on the Hub of which only some tensors are fetched."""

from __future__ import annotations

import json
import struct
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]
from safetensors.torch import load
from torch import Tensor

_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


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
