"""Which blocks of a vision transformer give the patch tokens, and how several are joined.

A layer is the index of a block, whose output passes the final norm, or `6.attn`: what the
self-attention of block 6 hands on, before layer scale and the residual sum, each token normed
(without weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import EncoderError

ATTENTION = ".attn"


def block_of(layer: int | str) -> int:
    """Index of the block: 6 for 6 and for `6.attn`."""
    return int(str(layer).removesuffix(ATTENTION))


def checked_layers(model: Any, name: str, layers: Sequence[int | str]) -> list[int | str]:
    """The layers in the order of the blocks, counted from 0; a block's attention before its output.

    Args:
        model: timm model.
        name: of the model, for errors.
        layers: indices of blocks, from 0, or from the end with -1; `6.attn` or `-6.attn`.

    Raises:
        EncoderError: a block that the model does not have, one named twice, none, or a block's
            output where the model has no final norm.
    """
    count, found = len(model.blocks), set()
    for layer in layers:
        try:
            index = block_of(layer)
        except ValueError:
            index = count  # no block
        if -count <= index < count:
            found.add((index % count, not str(layer).endswith(ATTENTION)))
    if not layers or len(found) < len(layers):
        raise EncoderError(
            f"vision.layers={list(layers)}: give different blocks of {name} from 0 to {count - 1}, "
            f"or from -{count} to -1, with .attn for what its attention adds ([6.attn]), or null "
            "for what the model gives"
        )
    if any(whole for _, whole in found) and not hasattr(model, "norm"):
        raise EncoderError(f"vision.layers={list(layers)}: {name} has no final norm")
    return [index if whole else f"{index}{ATTENTION}" for index, whole in sorted(found)]


@contextmanager
def watched(model: Any, layers: Iterable[int | str]) -> Iterator[dict[int | str, Tensor]]:
    """What the layers give in the forward pass inside, `[B, N, D]` (SAM: `[B, h, w, D]`)."""
    taps: dict[int | str, Tensor] = {}
    hooks = []
    for layer in set(layers):
        block = model.blocks[block_of(layer)]
        module = block if isinstance(layer, int) else block.attn
        hooks.append(
            module.register_forward_hook(
                lambda _module, _inputs, output, layer=layer: taps.update({layer: output})
            )
        )
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def join_layers(
    model: Any, taps: Mapping[int | str, Tensor], layers: Sequence[int | str]
) -> Tensor:
    """Tokens `[B, N, D x layers]`, normed layer by layer."""
    parts = []
    for layer in layers:
        tokens = taps[layer].flatten(1, -2)
        if isinstance(layer, int):
            parts.append(model.norm(tokens))
        else:
            parts.append(F.layer_norm(tokens, tokens.shape[-1:]))
    return torch.cat(parts, dim=-1)
