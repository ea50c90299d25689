"""Text towers of CLIP models, through open_clip."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.original import OriginalRepository, find_original
from talk2dino.encoders.text.base import FrozenTextEncoder, TextFeatures
from talk2dino.encoders.weights import first_line, load_strictly, quiet, seeded
from talk2dino.errors import EncoderError
from talk2dino.files import user_path


class OpenClipTextEncoder(FrozenTextEncoder):
    """The text tower of a CLIP model.

    Args:
        name: open_clip architecture; OpenAI's ViT-B/16 is `ViT-B-16-quickgelu`.
        weights: an open_clip pretrained tag (downloaded), `random` (always the same ones), a
            local checkpoint of the whole model, or a folder or Hub id of a whole original model,
            whose text tower is read.
        batch_size: captions per forward pass.
        templates: prompt templates for class names.

    Raises:
        EncoderError: unknown architecture, or weights that are not available.
    """

    def __init__(
        self,
        name: str = "ViT-B-16-quickgelu",
        weights: str = "openai",
        batch_size: int = 256,
        templates: str = "imagenet80",
    ) -> None:
        super().__init__(name, weights, batch_size, templates)
        import open_clip

        original = _check_source(name, weights)
        pretrained = None if weights == "random" or original else str(user_path(weights))
        try:
            # some towers come from the Hub
            with seeded(draw=original is None), quiet(), cached_if_unreachable():
                model = open_clip.create_model(name, pretrained, force_custom_text=True)
                self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a file of something else fails in any way at all
            raise EncoderError(
                f"text.weights={weights!r}: cannot get the weights of {name} "
                f"({first_line(error)}); give a local file with text.weights=FILE, or use "
                "text=minilm, which needs no download"
            ) from error
        if original:
            load_strictly(model.text, original.tensors("text"), "text.weights", weights)
        self.tower: Any = model.text.requires_grad_(False).eval()
        self.embed_dim: int = int(open_clip.get_model_config(name)["embed_dim"])

    @torch.no_grad()
    def encode_tokens(self, texts: Sequence[str]) -> TextFeatures:
        """Return pooled and token-level outputs; L is the context length (77), W the tower's width.

        Raises:
            EncoderError: a tower that is not CLIP's, or that appends a token of its own (CoCa).
        """
        tower = self.tower
        if not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
            raise EncoderError(
                f"text.name={self.name}: token-level outputs need CLIP's own text tower, this is "
                f"{type(tower).__name__}; choose text=clip_vitb16"
            )
        return super().encode_tokens(texts)

    def _ids(self, texts: list[str]) -> Tensor:
        """Token ids [b, L] on the tower's device; long captions are cut and still end with EOT."""
        ids: Tensor = self.tokenizer(texts)
        return ids.to(next(self.parameters()).device)

    def _most_tokens(self) -> int:
        return int(self.tokenizer.context_length)

    def _counts(self, texts: list[str]) -> list[int]:
        longest = max(len(text.encode(errors="replace")) for text in texts)
        ids: Tensor = self.tokenizer(texts, context_length=longest + 2)
        own = getattr(self.tower, "pad_id", 0)  # of CLIP's own tokenizer; it is also the id of "!"
        given = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None)
        padding = own if given is None else int(given)
        places = torch.arange(1, ids.shape[1] + 1)
        return [int(last) for last in (torch.ne(ids, padding) * places).amax(dim=1)]

    def _embeddings(self, texts: list[str]) -> Tensor:
        embeddings: Tensor = self.tower(self._ids(texts))
        return embeddings

    def _features(self, texts: list[str]) -> TextFeatures:
        ids = self._ids(texts)
        seen: dict[str, Tensor] = {}
        blocks, norm = self.tower.transformer.resblocks, self.tower.ln_final
        hooks = [
            blocks[-2].register_forward_hook(lambda _m, _i, out: seen.update(earlier=out)),
            norm.register_forward_hook(lambda _m, _i, out: seen.update(normed=out)),
        ]
        try:
            pooled = self.tower(ids)  # [b, C]
        finally:
            for hook in hooks:
                hook.remove()
        earlier = seen["earlier"]
        if not getattr(self.tower.transformer, "batch_first", True):
            earlier = earlier.transpose(0, 1)  # [L, b, W] -> [b, L, W]
        return TextFeatures(
            embedding=pooled.float().cpu(),
            token_embeddings=self._project(seen["normed"]).float().cpu(),
            token_mask=(ids != getattr(self.tower, "pad_id", 0)).cpu(),
            second_last_tokens=earlier.float().cpu(),
            eot_index=self._pooled_position(ids).cpu(),
        )

    def _project(self, tokens: Tensor) -> Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return tokens
        out: Tensor = (
            projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection
        )
        return out

    def _pooled_position(self, ids: Tensor) -> Tensor:
        """[b] index of the token that the tower pools."""
        pool = getattr(self.tower, "pool_type", "argmax")
        if pool == "argmax":  # the end token has the highest id
            return ids.argmax(dim=-1)
        if pool == "eos":
            found: Tensor = ids == self.tower.eos_id
            return found.int().argmax(dim=-1)
        return torch.full_like(ids[:, 0], 0 if pool == "first" else ids.shape[1] - 1)


def _check_source(name: str, weights: str) -> OriginalRepository | None:
    """Refuse what open_clip would log at length; the repository if it is one of the original's."""
    import open_clip

    if open_clip.get_model_config(name) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise EncoderError(
            f"text.name={name!r} is not an open_clip architecture"
            + (f"; near it: {', '.join(near)}" if near else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights == "random" or weights in tags:
        return None
    original = find_original(weights)
    if original is None and not user_path(weights).is_file():
        raise EncoderError(
            f"text.weights={weights!r} is neither a file nor a pretrained tag of {name}; "
            f"choose random, a file, or one of: {', '.join(tags) or 'none exists'}"
        )
    return original
