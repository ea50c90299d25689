"""Token-level text and every projection, from images to a segmentation, by the entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from talk2dino import Talk2DINO, load_projection
from talk2dino.alignment.class_names import embed_class_names
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.inputs import (
    caption_fields,
    projected_text,
    projected_visual,
)
from talk2dino.alignment.projection import (
    DoubleMLP,
    ProjectionLayer,
    VisualProjectionLayer,
    visual_side,
)
from talk2dino.alignment.similarity import (
    DotProduct,
    MaxRowSum,
    MaxScore,
    MeanHeads,
    Similarity,
    SumHeads,
)
from talk2dino.datasets.captions import CaptionFolder
from talk2dino.encoders.build import build_text, build_vision
from talk2dino.errors import ConfigError
from talk2dino.evaluate import fresh_projection
from talk2dino.features import FeatureDataModule, FeatureStore
from talk2dino.features.extraction.job import Extraction
from talk2dino.features.store.shard_reader import MappedRows
from talk2dino.segmentation import Segmenter
from tests.helpers.encoders import HashText
from tests.helpers.evaluations import write_benchmark
from tests.helpers.pipeline import BUNDLED, TRAIN, fails, need, run
from tests.helpers.stores import CAPTION_FIELDS, IMAGE_FIELDS, IMAGES, caption, extract

WIDTHS = ("experiment=vits_infonce", "projection.text_dim=256", "projection.vision_dim=64")
NAMES = ["red", "green", "blue"]


def train(store: Path, folder: Path, *overrides: str) -> Path:
    run(
        "train",
        *WIDTHS,
        f"store={store}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_steps=2",
        "optimizer.lr=1e-2",
        "loss.normalize_by_batch_squared=false",
        *overrides,
        *TRAIN,
        f"hydra.run.dir={folder}",
    )
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("squares") / "data", count=2, size=(64, 80))


def evaluate(checkpoint: Path, squares: Path, folder: Path) -> dict[str, Any]:
    run(
        "evaluate",
        f"checkpoint={checkpoint}",
        f"benchmark.root={squares}",
        "benchmark.images=images",
        "benchmark.masks=masks",
        "benchmark.classes=classes.json",
        *[f"benchmark.{key}=64" for key in ("short_side", "window", "stride", "input_size")],
        "benchmark.background_cleaning=true",
        "pictures=0",
        "num_workers=0",
        "compare_untrained=true",
        *TRAIN,
        f"hydra.run.dir={folder}",
    )
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


# --- extraction


def test_the_store_holds_what_the_encoders_give(token_store: Path, pictures: Path) -> None:
    store = FeatureStore(token_store)
    assert store.verify() == []
    assert set(IMAGE_FIELDS) < set(store.images.fields)
    assert store.text is not None and store.vision is not None
    texts = [caption(number) for number in range(IMAGES)]
    want = build_text(store.text.spec).encode_tokens(texts)  # type: ignore[attr-defined]
    assert want.token_mask.sum(1).unique().numel() > 2  # captions of different lengths
    for name in CAPTION_FIELDS:
        got = torch.from_numpy(store.captions[name][:])
        assert got.dtype == getattr(want, name).dtype
        torch.testing.assert_close(got, getattr(want, name), atol=1e-5, rtol=1e-4)
    source = CaptionFolder(str(pictures))
    pixels = torch.stack(
        [torch.from_numpy(np.array(source.image(n))).permute(2, 0, 1) for n in range(4)]
    )
    seen = build_vision(store.vision.spec)(pixels.float() / 255)
    got = torch.from_numpy(store.images["second_last_out"][:4])
    torch.testing.assert_close(got, seen.second_last_out, atol=1e-4, rtol=1e-4)
    for shard in range(3):
        rows = store.shard(shard).rows
        assert all(isinstance(field, MappedRows) for field in rows.values())


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("tokens", {"embedding", "token_embeddings", "token_mask"}),
        ("clip_last_layer", {"embedding", "second_last_tokens", "eot_index"}),
    ],
)
def test_the_options_store_their_fields(
    option: str, fields: set[str], pictures: Path, tmp_path: Path, token_store: Path
) -> None:
    store = FeatureStore(
        extract(pictures, tmp_path / "store", f"features={option}", "source.limit=12")
    )
    assert set(store.captions.fields) == fields | {"id", "image_row", "text"}
    whole = FeatureStore(token_store)
    for name in fields:
        got, want = store.captions[name][:], whole.captions[name][:12]
        assert got.dtype == (np.float16 if want.dtype == np.float32 else want.dtype)
        np.testing.assert_allclose(got, want.astype(got.dtype), rtol=2e-3, atol=2e-3)


def test_expected_bytes_are_those_of_the_store(token_store: Path, pictures: Path) -> None:
    store = FeatureStore(token_store)
    assert store.vision is not None and store.text is not None
    job = Extraction(
        CaptionFolder(str(pictures)),
        build_vision(store.vision.spec),
        build_text(store.text.spec),
        token_store,
        image_fields=IMAGE_FIELDS,
        caption_fields=CAPTION_FIELDS,
        dtype="float32",
    )
    fields = [store.images[name] for name in IMAGE_FIELDS]
    fields += [store.captions[name] for name in CAPTION_FIELDS]
    assert job.expected_bytes() == sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["tokens"], "'tokens' is unknown; choose of embedding, token_emb"),
        ([], "caption_fields is empty"),
        (["token_embeddings"], "of no use alone; give token_embeddings and token_mask"),
        (["embedding", "eot_index"], "give second_last_tokens and eot_index"),
        (["token_embeddings", "token_mask"], "HashText does not give token_embeddings; choose"),
    ],
)
def test_caption_fields_are_checked_first(
    fields: list[str], said: str, token_store: Path, pictures: Path, tmp_path: Path
) -> None:
    vision: Any = None  # never asked
    with pytest.raises(ConfigError, match=said):
        Extraction(
            CaptionFolder(str(pictures)), vision, HashText(), tmp_path, caption_fields=fields
        )


def test_a_text_encoder_without_the_field_is_one_line(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need(*BUNDLED)
    line = fails(
        capfd,
        "extract",
        "source=folder",
        f"source.images={pictures}",
        "vision=timm",
        "vision.name=test_vit",
        "vision.weights=random",
        "vision.image_size=64",
        "text=minilm",
        "features=clip_last_layer",
        f"store={tmp_path / 'store'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert "SentenceTransformerTextEncoder does not give second_last_tokens" in line
    assert not list((tmp_path / "store").iterdir())


# --- what a batch becomes


def batch_of(store: Path, similarity: Similarity, projection: Any, count: int = 6) -> Any:
    data = FeatureDataModule(
        store,
        image_fields=IMAGE_FIELDS,
        caption_fields=caption_fields(projection, similarity),
    )
    return data.train_data[np.arange(count)]


@pytest.mark.parametrize("kind", [SumHeads, MeanHeads, MaxRowSum])
@pytest.mark.parametrize("keep", [False, True])
def test_token_scores_from_the_store_equal_a_loop(kind: Any, keep: bool, token_store: Path) -> None:
    similarity = kind(text_field="token_embeddings", keep_cls=keep, keep_end_seq=keep)
    projection = ProjectionLayer(256, 64).eval()
    batch = batch_of(token_store, similarity, projection)
    before = batch["token_mask"].clone()
    with torch.no_grad():
        text, mask = projected_text(batch, projection, similarity)
        heads = projected_visual(batch, projection, similarity)
        got = similarity(text, heads, mask)
    assert torch.equal(batch["token_mask"], before)
    count, length = before.shape
    for t in range(count):
        words = int(before[t].sum())
        kept = range(words) if keep else range(1, words - 1)
        for i in range(count):
            table = torch.zeros(length, heads.shape[1])
            for s in kept:
                with torch.no_grad():
                    token = projection(batch["token_embeddings"][t, s])
                table[s] = torch.stack([F.cosine_similarity(token, h, dim=0) for h in heads[i]])
            want = {
                SumHeads: table.sum(),
                MeanHeads: table.mean(),
                MaxRowSum: table.max(dim=1).values.sum(),
            }[kind]
            assert float(got[t, i]) == pytest.approx(float(want), abs=2e-5)


def test_the_token_average_leaves_out_start_and_end(token_store: Path) -> None:
    similarity = MaxScore(text_field="token_average")
    projection = ProjectionLayer(256, 64)
    batch = batch_of(token_store, similarity, projection)
    text, mask = projected_text(batch, projection, similarity)
    assert mask is None
    for row, (tokens, keep) in enumerate(
        zip(batch["token_embeddings"], batch["token_mask"], strict=True)
    ):
        want = projection(tokens[keep][1:-1].mean(0))
        torch.testing.assert_close(text[row], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["static", "conditioned"])
def test_head_weights_pool_the_image(weighting: Any, token_store: Path) -> None:
    similarity = DotProduct()
    projection = ProjectionLayer(256, 64, head_weighting=weighting, num_heads=2)
    batch = batch_of(token_store, similarity, projection)
    got = projected_visual(batch, projection, similarity)
    torch.testing.assert_close(
        got,
        projection.pool_visual(batch["patch_tokens"], batch["self_attn_maps"], batch["cls_token"]),
    )
    if weighting == "static":  # equal weights: the mean of the maps, scaled by softmax(0) = 1/2
        attention = (batch["self_attn_maps"] / 2).mean(1).softmax(-1)
        want = torch.einsum("bp,bpd->bd", attention, batch["patch_tokens"]) / 16
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        assert "cls_token" not in projection.pooled_fields
    else:
        with pytest.raises(ConfigError, match="needs the field cls_token"):
            projection.pool_visual(batch["patch_tokens"], batch["self_attn_maps"])


# --- the entry points

CHOICES = {
    "sum": ["similarity=sum", "similarity.text_field=token_embeddings"],
    "mean": ["similarity=mean", "similarity.text_field=token_embeddings"],
    "max_row_sum": ["similarity=max_row_sum", "similarity.text_field=token_embeddings"],
    "nucleus": ["similarity=nucleus", "similarity.text_field=token_embeddings"],
    "tokens, validated": [
        "similarity=sum",
        "similarity.text_field=token_embeddings",
        "val_similarity._target_=talk2dino.alignment.similarity.MeanHeads",
        "val_similarity.text_field=token_embeddings",
    ],
    "token_average": ["similarity.text_field=token_average"],
    "double_mlp, dense": ["projection=double_mlp", "similarity=dense", "val_similarity=dense"],
    "visual": ["projection=visual"],
    "visual, tokens": [
        "projection=visual",
        "projection.hidden_dim=32",
        "similarity=max_row_sum",
        "similarity.text_field=token_embeddings",
    ],
    "static_heads": ["projection=static_heads", "similarity=pooled"],
    "conditioned_heads": ["projection=conditioned_heads", "similarity=pooled"],
    "clip_last_layer": ["projection=clip_last_layer"],
    "second_last_out": ["similarity=pooled", "similarity.field=second_last_out"],
}

EVALUATED = ("double_mlp, dense", "visual", "conditioned_heads", "clip_last_layer")


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains_and_evaluates(
    choice: str, token_store: Path, squares: Path, tmp_path: Path
) -> None:
    folder = train(token_store, tmp_path / "run", *CHOICES[choice])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert np.isfinite(metrics["train/loss"])
    assert np.isfinite(metrics["validation"][-1]["val/text_to_image/recall@5"])
    trained = load_projection(folder / "projection.safetensors")
    if trained_heads := trained.hyperparameters.get("head_weighting"):
        assert trained.hyperparameters["num_heads"] == 2
        if trained_heads == "static":
            assert trained.attn_weights.abs().min() > 1e-4  # type: ignore[union-attr, operator]
    if choice not in EVALUATED:
        return
    results = evaluate(folder, squares, tmp_path / "evaluation")
    assert results["images"] == 2
    assert 0 <= results["miou"] <= 100
    assert (tmp_path / "evaluation" / "results_untrained.json").is_file()


@pytest.fixture(scope="module")
def still(token_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at rate 0."""
    folder = tmp_path_factory.mktemp("still")
    return train(token_store, folder, "projection=clip_last_layer", "optimizer.lr=0.0")


def test_clip_last_layer_starts_as_the_encoder(still: Path) -> None:
    model = Talk2DINO.from_pretrained(still, device="cpu")
    projection = model.projection
    assert isinstance(projection, CLIPLastLayer)
    texts = ["a dog", "two dogs on a beach"]
    with torch.no_grad():
        want = projection.projection(model.text.encode(texts))
    torch.testing.assert_close(model.encode_text(texts), want, atol=1e-4, rtol=1e-3)
    got, rows = embed_class_names([["cat"], ["dog", "hound"]], model.text, projection, "simple7")
    plain, _ = embed_class_names(
        [["cat"], ["dog", "hound"]], model.text, projection.projection, "simple7"
    )
    assert rows.tolist() == [0, 1, 1]
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert model.segment(image, NAMES, short_side=64).labels.shape == (64, 64)
    again = fresh_projection(projection, model.text)
    assert isinstance(again, CLIPLastLayer)
    for key, value in projection.last_block.state_dict().items():
        assert torch.equal(again.last_block.state_dict()[key], value)


def test_clip_last_layer_learns_its_block(token_store: Path, still: Path, tmp_path: Path) -> None:
    moved = train(token_store, tmp_path, "projection=clip_last_layer")
    one, other = (load_projection(run / "projection.safetensors") for run in (still, moved))
    for name in ("last_block.mlp.c_fc.weight", "text_projection", "projection.linear_layer.weight"):
        assert not torch.equal(one.state_dict()[name], other.state_dict()[name]), name


@pytest.mark.parametrize("projection", [DoubleMLP(256, 64), VisualProjectionLayer(256, 64)])
def test_the_image_side_stands_before_the_scores(projection: Any, token_store: Path) -> None:
    store = FeatureStore(token_store)
    assert store.vision is not None and store.text is not None
    model = Talk2DINO(build_vision(store.vision.spec), build_text(store.text.spec), projection)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    text, _ = embed_class_names([[name] for name in NAMES], model.text, projection)
    segmenter = model.segmenter(None, pamr=False, short_side=64)
    encoded = segmenter.encode(image)
    tokens = model.encode_image(image)  # already through the image side
    assert tokens.shape == (1, 16, text.shape[1])
    with torch.no_grad():
        want = (F.normalize(tokens, dim=-1) @ text.T).sigmoid()  # [1, 16, K]
        got = segmenter.token_scores(encoded.features, text)
    torch.testing.assert_close(got[0].flatten(1).T, want[0], atol=1e-5, rtol=1e-4)
    clean = model.segmenter(0.5, pamr=False, short_side=64)
    assert clean.protocol.background_cleaning
    assert clean.scores(encoded, text).shape == (3, 64, 64)
    assert clean.project_patches is not None  # moves with the segmenter
    assert {name.split(".")[0] for name, _ in clean.named_parameters()} >= {"project_patches"}


def test_a_text_side_alone_leaves_the_patches() -> None:
    assert visual_side(ProjectionLayer(6, 8)) is None
    segmenter = Segmenter(torch.nn.Identity(), window=8, stride=8, input_size=8)
    assert segmenter.project_patches is None


# --- combinations that make no sense


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["similarity.text_field=token_embeddings"], "MaxScore compares one vector per caption"),
        (["similarity=dense", "similarity.text_field=token_embeddings"], "Dense compares one"),
        (["similarity=sum", "similarity.text_field=tokens"], "similarity.text_field='tokens'"),
        (["projection=static_heads"], "choose similarity=pooled"),
        (["projection=conditioned_heads", "similarity=dense"], "choose similarity=pooled"),
        (["projection=conditioned_heads", "projection.activation=null"], "projection.activation"),
        (
            [
                "projection=clip_last_layer",
                "similarity=sum",
                "similarity.text_field=token_embeddings",
            ],
            "CLIPLastLayer reads second_last_tokens and eot_index",
        ),
        (
            ["projection=clip_last_layer", "val_similarity.text_field=token_average"],
            "val_similarity.text_field=embedding",
        ),
        (["projection=visual", "projection.text_dim=99"], "holds features of width 256"),
        (["record_heads=true", "similarity=dense"], "record_heads=true: similarity.field=patch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_senseless_combinations_are_one_line(
    overrides: list[str],
    said: str,
    token_store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = fails(
        capfd, "train", *WIDTHS, f"store={token_store}", *overrides, f"hydra.run.dir={tmp_path}"
    )
    assert said in line
    assert len(line) < 400


def test_a_store_without_the_fields_is_one_line(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = extract(pictures, tmp_path / "store", "features=pooled", "source.limit=12")
    for overrides, missing in (
        (["similarity=sum", "similarity.text_field=token_embeddings"], "token_embeddings"),
        (["projection=clip_last_layer"], "second_last_tokens"),
        (["projection=static_heads", "similarity=pooled"], "self_attn_maps"),
    ):
        run_folder = f"hydra.run.dir={tmp_path / 'run'}"
        line = fails(capfd, "train", *WIDTHS, f"store={store}", *overrides, run_folder)
        assert f"have no field '{missing}'" in line


def other_weights(store: Path, copy: Path, **text: Any) -> Path:
    """A store whose manifest says something else about its text encoder."""
    copy.mkdir()
    for file in store.glob("*.h5"):
        (copy / file.name).symlink_to(file)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["text"] |= text
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"weights_sha256": "0"}, "has other weights now than at extraction"),
        ({"spec": {}}, "does not name its text encoder"),
        ({"spec": {"_target_": "os.system", "command": "true"}}, "is none of talk2dino"),
    ],
    ids=["weights", "nothing", "foreign"],
)
def test_the_text_encoder_of_the_store_is_checked(
    text: dict[str, Any],
    said: str,
    token_store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store = other_weights(token_store, tmp_path / "store", **text)
    line = fails(
        capfd,
        "train",
        *WIDTHS,
        "projection=clip_last_layer",
        f"store={store}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert said in line


def test_a_text_encoder_without_tokens_cannot_serve_clip_last_layer() -> None:
    projection = CLIPLastLayer(8, 6, width=4, num_text_heads=2)
    with pytest.raises(ConfigError, match="HashText does not give second_last_tokens"):
        embed_class_names([["cat"]], HashText(), projection)
    with pytest.raises(ConfigError, match="HashText has no CLIP text tower"):
        CLIPLastLayer.from_text_encoder(HashText(), 6)
