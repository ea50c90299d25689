"""Text encoders: CLIP at random, MiniLM for real, and the cache in front of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.encoders.build import build_text
from talk2dino.encoders.bundled import minilm_folder
from talk2dino.encoders.text import (
    BertTextEncoder,
    OpenClipTextEncoder,
    SentenceTransformerTextEncoder,
    TextFeatures,
)
from talk2dino.encoders.text.base import (
    CachedTextEncoder,
    FrozenTextEncoder,
    average_text_tokens,
)
from talk2dino.errors import ConfigError, EncoderError
from tests.helpers.encoders import SMALL_CLIP

TEXTS = ["a cat", "two dogs run along a very long beach", "", "a cat"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def clip() -> OpenClipTextEncoder:
    return OpenClipTextEncoder(SMALL_CLIP, weights="random", batch_size=3)


@cache
def minilm() -> SentenceTransformerTextEncoder:
    return SentenceTransformerTextEncoder(max_length=12)


@cache
def bert() -> BertTextEncoder:
    return BertTextEncoder("all-MiniLM-L6-v2", weights="bundled", pooling="mean", max_length=16)


@pytest.mark.gpu
def test_gpu_agrees(gpu: torch.device) -> None:
    encoder = OpenClipTextEncoder(SMALL_CLIP, weights="random", batch_size=3)
    want, tokens = encoder.encode(TEXTS), encoder.encode_tokens(TEXTS)
    encoder.to(gpu)
    got, again = encoder.encode(TEXTS), encoder.encode_tokens(TEXTS)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 * float(want.abs().max()))
    atol = 2e-4 * float(tokens.token_embeddings.abs().max())
    torch.testing.assert_close(again.token_embeddings, tokens.token_embeddings, rtol=0, atol=atol)
    assert torch.equal(again.token_mask, tokens.token_mask)


def check_tokens(features: TextFeatures, texts: Sequence[str], width: int) -> None:
    count, length = features.token_mask.shape
    assert count == len(texts) and features.token_mask.dtype == torch.bool
    assert features.embedding.shape == (count, width)
    assert features.token_embeddings.shape == (count, length, width)
    assert features.eot_index.dtype == torch.int64
    lengths = features.token_mask.sum(1)
    assert torch.equal(features.token_mask, torch.arange(length) < lengths[:, None])  # no gaps
    assert torch.equal(features.eot_index, lengths - 1)
    for tensor in (features.embedding, features.token_embeddings):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"


# ---- CLIP ----------------------------------------------------------------------------------------


def test_clip_equals_the_whole_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(SMALL_CLIP, force_custom_text=True).eval()
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer(SMALL_CLIP)(TEXTS))
    got = clip().encode(TEXTS)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert clip().encode([]).shape == (0, clip().embed_dim)
    torch.testing.assert_close(got[0], got[3], atol=1e-5, rtol=1e-4)  # of another batch
    assert (got[0] - got[1]).abs().max() > 0.1


def test_clip_tokens_are_projected_one_by_one() -> None:
    features = clip().encode_tokens(TEXTS)
    check_tokens(features, TEXTS, clip().embed_dim)
    torch.testing.assert_close(features.embedding, clip().encode(TEXTS))
    rows = torch.arange(len(TEXTS))
    end = features.token_embeddings[rows, features.eot_index]
    torch.testing.assert_close(end, features.embedding, atol=1e-5, rtol=1e-4)
    ids = clip().tokenizer(TEXTS)
    assert torch.equal(features.token_mask, ids > 0)  # original `text_input_mask`
    assert torch.equal(features.eot_index, ids.argmax(-1))  # original `text_argmax`
    averaged = average_text_tokens(features.token_embeddings, features.token_mask)
    assert not averaged[2].any()  # the empty caption has start and end only
    torch.testing.assert_close(averaged[0], features.token_embeddings[0, 1:3].mean(0))
    assert clip().encode_tokens([]).token_embeddings.shape == (0, 77, clip().embed_dim)


def test_second_last_tokens_lead_back_to_the_embedding() -> None:
    """The chain of the fine-tuned variant starts where the encoder was cut."""
    projection = CLIPLastLayer.from_text_encoder(clip(), vision_dim=24).eval()
    features = clip().encode_tokens(TEXTS)
    assert features.second_last_tokens is not None
    with torch.no_grad():
        got = projection(features.second_last_tokens, features.eot_index)
        wanted = projection.projection(clip().encode(TEXTS))
    assert got.shape == (4, 24)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_long_captions_are_cut_and_keep_their_end() -> None:
    features = clip().encode_tokens(["very " * 200 + "long"])
    assert features.token_mask.all() and features.eot_index.item() == 76


@pytest.mark.parametrize(
    ("make", "most"),
    [(clip, 75), (minilm, 10), (bert, 14)],
    ids=["clip", "minilm", "bert"],
)
def test_what_is_cut_is_told(make: Callable[[], FrozenTextEncoder], most: int) -> None:
    """Words of one token each; a start and an end are read besides."""
    whole, cut = "very " * (most - 1) + "cat", "very " * most + "cat"
    texts = ["a cat", whole, cut, "very " * 600]
    assert make().cut(texts) == texts[2:]


@pytest.mark.parametrize("padding", [0, 7])
def test_tokens_of_other_tokenizers_are_counted_without_their_padding(padding: int) -> None:
    """Exclamation marks have the id with which CLIP pads; SigLIP's tokenizers pad with another."""
    encoder = OpenClipTextEncoder(SMALL_CLIP, weights="random")
    assert encoder.cut(["!! " * 80, "! " * 30]) == ["!! " * 80]
    encoder.tokenizer = _Words(padding)
    assert encoder.cut([]) == []
    assert encoder.cut(["a " * 77, "a " * 78]) == ["a " * 78]


class _Words:
    """Words as ids behind the interface of `open_clip`'s tokenizers of Hugging Face."""

    context_length = 77

    def __init__(self, padding: int) -> None:
        self.tokenizer = SimpleNamespace(pad_token_id=padding)

    def __call__(self, texts: list[str], context_length: int = 77) -> Tensor:
        assert texts, "it fails without a text"
        ids = torch.full((len(texts), context_length), self.tokenizer.pad_token_id)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text.split())] = 3
        return ids


def test_clip_specs_build_the_same_encoder() -> None:
    described = clip().describe()
    assert build_text(described["spec"]).describe() == described
    assert not clip().train().training
    assert not any(p.requires_grad for p in clip().parameters())


def test_clip_loads_a_local_checkpoint(tmp_path: Path) -> None:
    model = open_clip.create_model(SMALL_CLIP)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    loaded = OpenClipTextEncoder(SMALL_CLIP, weights=str(tmp_path / "clip.pt"))
    with torch.no_grad():
        wanted = model.eval().encode_text(loaded.tokenizer(TEXTS))
    torch.testing.assert_close(loaded.encode(TEXTS), wanted, atol=1e-5, rtol=1e-4)


def test_wrong_clip_names_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"text\.name='ViT-B-61' .*near it: ViT-B-16"):
        OpenClipTextEncoder("ViT-B-61", weights="random")
    with pytest.raises(EncoderError, match=r"text\.weights='openay' .*one of: openai"):
        OpenClipTextEncoder("ViT-B-16-quickgelu", weights="openay")
    (tmp_path / "bad.pt").write_text("hello")
    with pytest.raises(EncoderError, match=r"bad\.pt'") as caught:
        OpenClipTextEncoder(SMALL_CLIP, weights=str(tmp_path / "bad.pt"))
    assert "\n" not in str(caught.value)
    torch.save({"x": torch.ones(2)}, tmp_path / "keys.pt")
    with pytest.raises(EncoderError, match=r"keys\.pt'") as caught:
        OpenClipTextEncoder(SMALL_CLIP, weights=str(tmp_path / "keys.pt"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_without_a_network_the_messages_are_quick_and_clear(
    unreachable: None, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    for make, match in (
        (lambda: OpenClipTextEncoder(), "cannot get the weights of ViT-B-16-quickgelu"),
        (lambda: OpenClipTextEncoder("coca_roberta-ViT-B-32", "random"), "coca_roberta"),
        (lambda: SentenceTransformerTextEncoder("a/b", weights="hub"), "cannot load a/b"),
        (lambda: BertTextEncoder(), "cannot load google-bert/bert-base-uncased"),
    ):
        with pytest.raises(EncoderError, match=match) as caught:
            make()
        assert "\n" not in str(caught.value) and "text=minilm" in str(caught.value)
    assert time.monotonic() - start < 15
    assert not caplog.records


# ---- sentence encoders ---------------------------------------------------------------------------


def test_minilm_knows_what_resembles_what() -> None:
    embedding = F.normalize(minilm().encode(["a cat", "a kitten", "a motorcycle"]), dim=-1)
    similar = embedding @ embedding.T
    assert similar[0, 1] > 0.6 > 0.4 > similar[0, 2]
    assert minilm().encode([]).shape == (0, 384)


def test_sentence_tokens() -> None:
    features = minilm().encode_tokens(TEXTS)
    check_tokens(features, TEXTS, 384)
    assert features.second_last_tokens is None
    torch.testing.assert_close(features.embedding, minilm().encode(TEXTS), atol=1e-5, rtol=1e-4)
    none = minilm().encode_tokens([])
    assert none.embedding.shape == (0, 384) and none.token_mask.dtype == torch.bool
    assert none.token_embeddings.shape[1:] == features.token_embeddings.shape[1:] == (12, 384)


def test_bert_agrees_with_sentence_transformers_on_the_same_weights() -> None:
    """Two libraries' roads to MiniLM: mean of the tokens (which the second also normalizes)."""
    ours, theirs = bert().encode(TEXTS), minilm().encode(TEXTS)
    torch.testing.assert_close(F.normalize(ours, dim=-1), theirs, atol=1e-5, rtol=1e-4)
    features, other = bert().encode_tokens(TEXTS), minilm().encode_tokens(TEXTS)
    check_tokens(features, TEXTS, 384)
    longest = other.token_mask.shape[1]
    assert torch.equal(features.token_mask[:, :longest], other.token_mask)
    shared = other.token_mask
    torch.testing.assert_close(
        features.token_embeddings[:, :longest][shared],
        other.token_embeddings[shared],
        atol=1e-4,
        rtol=1e-3,
    )


def test_bert_pooling_and_the_block_before_the_last() -> None:
    features = bert().encode_tokens(TEXTS)
    tokens, mask = features.token_embeddings, features.token_mask
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(features.embedding, mean, atol=1e-5, rtol=1e-4)
    encoder = bert()
    try:
        encoder.pooling = "cls"
        torch.testing.assert_close(encoder.encode(TEXTS), tokens[:, 0], atol=1e-5, rtol=1e-4)
        encoder.pooling = "pooler"
        with torch.no_grad():
            wanted = torch.tanh(encoder.model.pooler.dense(tokens[:, 0]))
        torch.testing.assert_close(encoder.encode(TEXTS), wanted, atol=1e-5, rtol=1e-4)
    finally:
        encoder.pooling = "mean"
    earlier, seen = features.second_last_tokens, []
    hook = encoder.model.encoder.layer[-2].register_forward_hook(
        lambda _m, _i, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    encoder.encode_tokens(TEXTS)
    hook.remove()
    assert earlier is not None
    torch.testing.assert_close(earlier, seen[0])
    described = encoder.describe()
    assert build_text(described["spec"]).describe() == described
    assert encoder.encode([]).shape == (0, 384)
    assert encoder.encode_tokens([]).token_embeddings.shape == (0, 16, 384)


def test_wrong_sentence_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.pooling='max'; choose"):
        BertTextEncoder(pooling="max")  # type: ignore[arg-type]
    for kind in (BertTextEncoder, SentenceTransformerTextEncoder):
        with pytest.raises(EncoderError, match="no such folder; use hub or bundled"):
            kind(weights=str(tmp_path / "none"))
        with pytest.raises(EncoderError, match="cannot load") as caught:
            kind(weights=str(tmp_path))
        assert "\n" not in str(caught.value)
    assert BertTextEncoder(weights=str(minilm_folder())).embed_dim == 384


# ---- cache ---------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Counts its work; an embedding is the length of the text."""

    templates = "plain"
    embed_dim = 2

    def __init__(self, digest: str = "a", pooling: str = "mean") -> None:
        super().__init__()
        self.calls, self.digest, self.pooling = 0, digest, pooling

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.calls += 1
        return torch.tensor([[float(len(text)), 1.0] for text in texts]).reshape(-1, 2)

    def describe(self) -> dict[str, Any]:
        spec = {"_target_": "x", "pooling": self.pooling, "batch_size": self.calls}
        return {"name": "x", "weights_sha256": self.digest, "embed_dim": 2, "spec": spec}


def test_cache_computes_a_list_of_sentences_once(tmp_path: Path) -> None:
    first = Counting()
    cached = CachedTextEncoder(first, tmp_path / "cache")
    for _ in range(2):
        assert torch.equal(cached.encode(["a", "bb"]), torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    assert first.calls == 1
    second = Counting()  # another process
    again = CachedTextEncoder(second, tmp_path / "cache")
    assert again.encode(["a", "bb"])[1, 0] == 2
    assert second.calls == 0
    again.encode(["bb", "a"])  # order counts
    again.encode(["a", "b", "b"])
    assert second.calls == 2
    assert again.encode([]).shape == (0, 2)
    assert again.templates == "plain" and again.describe() == second.describe()
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 3 and all(name.endswith(".safetensors") for name in names)


@pytest.mark.parametrize("other", [Counting("b"), Counting("a", "cls")])
def test_cache_tells_encoders_apart(tmp_path: Path, other: Counting) -> None:
    CachedTextEncoder(Counting("a"), tmp_path).encode(["a"])
    CachedTextEncoder(other, tmp_path).encode(["a"])
    assert other.calls == 1


def test_cache_computes_again_what_it_cannot_read(tmp_path: Path) -> None:
    CachedTextEncoder(Counting(), tmp_path).encode(["a"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    encoder = Counting()
    assert CachedTextEncoder(encoder, tmp_path).encode(["a"])[0, 0] == 1
    assert CachedTextEncoder(encoder, tmp_path).encode(["a"])[0, 0] == 1
    assert encoder.calls == 1


def test_without_a_writable_folder_everything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    inside = Counting("a")
    cached = CachedTextEncoder(inside, tmp_path / "file" / "text")
    assert torch.equal(cached.encode(["one", "two"]), cached.encode(["one", "two"]))
    assert inside.calls == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cache_is_exact_for_a_real_encoder(tmp_path: Path) -> None:
    cached = CachedTextEncoder(clip(), tmp_path)
    cached.encode(TEXTS)
    assert torch.equal(cached.encode(TEXTS), clip().encode(TEXTS))
    assert cached.to("cpu") is cached and cached.embed_dim == clip().embed_dim
