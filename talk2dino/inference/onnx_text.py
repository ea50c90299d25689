"""The text tower as an ONNX graph, with its tokenizer as a `tokenizer.json` of Hugging Face.

Token ids → embedding. The tokenizer is written in the form that the package `tokenizers` reads, and
the pair of both is compared with the encoder on sentences.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talk2dino.alignment.inputs import POOLED
from talk2dino.alignment.projection import Projection
from talk2dino.encoders.text import OpenClipTextEncoder, SentenceTransformerTextEncoder, TextEncoder
from talk2dino.encoders.text.prompts import templates
from talk2dino.errors import EncoderError
from talk2dino.files import replacing
from talk2dino.inference.onnx_files import ExportedFile, Graph, check_weights, write_graph

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# what is compared: punctuation, digits, accents, blanks, nothing, more than fits
SENTENCES = (
    "a photo of a cat.",
    "Two dark-brown sofas, 3 cushions & a child's toy!",
    "a café   in\tZürich",
    "",
    "a very long caption " * 80,
)


class SentenceGraph(nn.Module):
    """A sentence-transformers model as a function of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[N, L]` int64 each to `[N, C]`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        embedding: Tensor = self.model(given)["sentence_embedding"]
        return embedding


def check_text(text: TextEncoder, projection: Projection) -> None:
    """Refuse what `export_text` cannot write, before anything is written.

    Raises:
        EncoderError: another encoder, or a projection that reads more than its pooled embedding.
        ConfigError: too many weights.
    """
    if type(text) not in _PARTS:
        known = ", ".join(kind.__name__ for kind in _PARTS)
        raise EncoderError(f"text_tower=true: {type(text).__name__} is none of {known}")
    if projection.text_fields != POOLED:
        raise EncoderError(
            f"text_tower=true: {type(projection).__name__} reads {projection.text_fields[0]}, and "
            "the graph gives the pooled embedding"
        )
    check_weights("text", text)  # type: ignore[arg-type]  # those of the table are modules


def export_text(
    folder: Path,
    text: TextEncoder,
    template_set: str,
    metadata: Mapping[str, Any],
    tolerance: float = 1e-4,
) -> ExportedFile:
    """Write `text.onnx` and `tokenizer.json`: sentences to what `text.encode` gives.

    Args:
        folder: of both files.
        text: encoder that `check_text` takes.
        template_set: name of the prompt templates, whose sentences the metadata lists.
        metadata: JSON values for the file's `metadata_props`, besides those of the encoder.
        tolerance: largest difference from PyTorch that is accepted.

    Raises:
        EncoderError: this encoder cannot be exported.
        ConfigError: an absent package, or a deviation beyond the tolerance.
    """
    module, tokenizer, free = _PARTS[type(text)](text)
    encoded = tokenizer.encode_batch(list(SENTENCES))
    ids = torch.tensor([one.ids for one in encoded])
    masks = torch.tensor([one.attention_mask for one in encoded])
    inputs = {"input_ids": ids, "attention_mask": masks}
    inputs = {name: inputs[name] for name in free}
    patterns = [template("{}") for template in templates(template_set)]
    facts = {
        "tokenizer": "tokenizer.json",
        "prompts": patterns,  # means over these are what ψ takes
        "input": f"{', '.join(inputs)}: int64 [N, L], of tokenizer.json",
        "output": f"text_embedding: float32 [N, {text.embed_dim}]",
    }
    graph = Graph(
        module.eval(),
        inputs,
        "text_embedding",
        text.encode(SENTENCES),
        facts | dict(metadata),
        free,
    )
    done = write_graph(folder / "text.onnx", graph, tolerance)
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    return done


_Parts = tuple[nn.Module, "Tokenizer", Mapping[str, Mapping[int, str]]]


def _clip(text: Any) -> _Parts:
    """Tower and byte-pair tokenizer of a CLIP model; sentences are padded to its length."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    given = text.tokenizer
    if not isinstance(given, SimpleTokenizer):
        raise EncoderError(
            f"text_tower=true: {text.name} has the tokenizer {type(given).__name__}; only CLIP's "
            "own can be written"
        )
    start, end = (given.decoder[number] for number in (given.sot_token_id, given.eot_token_id))
    made = Tokenizer(
        models.BPE(given.encoder, list(given.bpe_ranks), end_of_word_suffix="</w>", unk_token=end)
    )
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(given.pat.pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = [(start, given.sot_token_id), (end, given.eot_token_id)]
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ends
    )
    made.enable_truncation(given.context_length)
    made.enable_padding(length=given.context_length, pad_id=0, pad_token=given.decoder[0])
    return copy.deepcopy(text.tower).cpu(), made, {"input_ids": {0: "sentences"}}


def _sentence(text: Any) -> _Parts:
    """Model and tokenizer of sentence-transformers; a batch is padded to its longest sentence."""
    from tokenizers import Tokenizer

    fast = getattr(text.model.tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise EncoderError(f"text_tower=true: the tokenizer of {text.name} cannot be written")
    made = Tokenizer.from_str(fast.to_str())
    made.enable_truncation(text.model.max_seq_length)
    padding = json.loads(fast.to_str())["padding"] or {}
    made.enable_padding(
        pad_id=padding.get("pad_id", text.model.tokenizer.pad_token_id),
        pad_token=text.model.tokenizer.pad_token,
    )
    axes = {0: "sentences", 1: "length"}
    module = SentenceGraph(copy.deepcopy(text.model).cpu())
    return module, made, {"input_ids": axes, "attention_mask": axes}


_PARTS: dict[type, Callable[[Any], _Parts]] = {
    OpenClipTextEncoder: _clip,
    SentenceTransformerTextEncoder: _sentence,
}
