"""Telling whether two runs used the same weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def state_dict_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and persistent buffers, hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
