"""The pass over a store against plain NumPy, and what a search of a whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from talk2dino import Talk2DINO
from talk2dino.alignment.projection import VisualProjectionLayer
from talk2dino.alignment.similarity import Dense
from talk2dino.calibration.calibration import Calibration
from talk2dino.calibration.rules import MeanOffset
from talk2dino.errors import CheckpointError, ConfigError, StoreError
from talk2dino.features import FeatureStore, write_store
from talk2dino.features.store.archive import archive_store
from talk2dino.finding import scan as module
from talk2dino.finding.recall import recall
from talk2dino.finding.scan import Scan, best_pictures
from talk2dino.segmentation.scores import with_offsets
from tests.helpers.encoders import hash_model
from tests.helpers.pipeline import need
from tests.helpers.stores import tiny_arrays, tiny_store

PATCHES, WIDTH = 4, 64  # of the tiny encoder at 32 pixels
FIELDS = {"patch_tokens": (PATCHES, WIDTH)}


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.fixture
def store(model: Talk2DINO, tmp_path: Path) -> FeatureStore:
    """23 pictures in shards of five."""
    vision = model.vision.describe()
    return FeatureStore(
        tiny_store(tmp_path / "store", FIELDS, images=23, text_dim=8, vision=vision)
    )


def unit_rows(count: int, width: int = WIDTH) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(1)), dim=1)


def by_hand(store: FeatureStore, rows: torch.Tensor) -> NDArray[np.float64]:
    """Cosines `[N, I, P]` in double precision."""
    tokens = store.images["patch_tokens"][:].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.einsum("nd,ipd->nip", rows.double().numpy(), tokens)


@pytest.mark.parametrize("texts", [1, 6, 40])
def test_the_best_pictures_are_those_of_a_sort(
    store: FeatureStore, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one picture and of several, more pictures than asked for and fewer."""
    rows = unit_rows(texts)
    scan = Scan(store, rows, torch.arange(texts))
    wanted = np.sort(by_hand(store, rows), axis=-1)[..., -3:].mean(-1)
    order = np.argsort(-wanted, axis=1)
    for block in (1, 4 * scan.field.row_bytes):
        monkeypatch.setattr(module, "BLOCK", block)
        for top in (1, 5, 40):
            scores, found = best_pictures(scan, top, best=3)
            assert found.numpy().tolist() == order[:, :top].tolist()
            right = np.take_along_axis(wanted, order[:, :top], axis=1)
            np.testing.assert_allclose(scores.numpy(), right, atol=1e-6)


def test_what_has_no_direction(store: FeatureStore) -> None:
    """A patch of zeros is like nothing; one that is not finite is an error, whatever else is."""
    rows = unit_rows(7)
    scan = Scan(store, rows, torch.arange(7))
    tokens = store.images["patch_tokens"][:]
    tokens[3, 1] = 0
    want = by_hand(store, rows)
    want[:, 3, 1] = 0
    np.testing.assert_allclose(scan.scores(tokens).numpy(), want, atol=1e-6)
    for value in (np.nan, np.inf, -np.inf):
        tokens[5, 2, 60] = value
        with pytest.raises(StoreError, match="row 25 holds NaN or infinity"):
            scan.scores(tokens, first=20)


def test_equal_pictures_come_in_the_order_of_the_store(tmp_path: Path) -> None:
    tokens = np.ones((9, 2, 4), np.float32)
    tokens[4] = -1
    write_store(tmp_path / "s", {"patch_tokens": tokens}, {"image_row": [0]}, images_per_shard=2)
    scan = Scan(FeatureStore(tmp_path / "s"), unit_rows(1, 4).abs(), torch.zeros(1).long())
    assert best_pictures(scan, 3, best=2)[1].tolist() == [[0, 1, 2]]
    assert best_pictures(scan, 9, best=2)[1].tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 4]]


def test_synonyms_and_offsets(store: FeatureStore) -> None:
    """A query is its best word, after the offset of each."""
    rows, offsets = unit_rows(5), torch.linspace(-0.2, 0.2, 5)
    scan = Scan(store, with_offsets(rows, offsets), torch.tensor([0, 1, 1, 2, 2]))
    single = by_hand(store, rows) - offsets.double().numpy()[:, None, None]
    want = np.stack([single[0], single[1:3].max(0), single[3:].max(0)])
    found = torch.cat([scores for _, scores in scan], dim=1)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-6)


def test_an_image_side_is_applied(store: FeatureStore) -> None:
    torch.manual_seed(0)
    psi = VisualProjectionLayer(WIDTH // 2, WIDTH, hidden_dim=16)  # texts of another width
    rows = unit_rows(2, WIDTH // 2)
    (_, scores), *_ = Scan(store, rows, torch.arange(2), psi)
    with torch.no_grad():
        tokens = psi.project_visual(torch.from_numpy(store.images["patch_tokens"][:5]).float())
    want = torch.einsum("nd,ipd->nip", rows, F.normalize(tokens, dim=-1))
    torch.testing.assert_close(scores, want, atol=1e-5, rtol=0)
    offsets = torch.tensor([0.1, -0.2])
    (_, scores), *_ = Scan(store, with_offsets(rows, offsets), torch.arange(2), psi)
    torch.testing.assert_close(scores, want - offsets[:, None, None], atol=1e-5, rtol=0)


def test_compressed_and_wide_stores_give_the_same(store: FeatureStore, tmp_path: Path) -> None:
    need("hdf5plugin")
    archive_store(store.path, tmp_path / "archive", compressed=True)
    images = {"patch_tokens": store.images["patch_tokens"][:]}
    write_store(tmp_path / "wide", images, {"image_row": [0]}, dtype="float32")
    rows = unit_rows(3)
    want = best_pictures(Scan(store, rows, torch.arange(3)), 6, 2)
    for name in ("archive", "wide"):
        scan = Scan(FeatureStore(tmp_path / name), rows, torch.arange(3))
        scores, found = best_pictures(scan, 6, 2)
        assert found.tolist() == want[1].tolist()
        torch.testing.assert_close(scores, want[0], atol=1e-6, rtol=0)


def test_damaged_rows_are_named(model: Talk2DINO, store: FeatureStore) -> None:
    with h5py.File(store.path / store.manifest.shards[1].file, "r+") as file:
        file["images/patch_tokens"][2, 2, 5] = np.nan
    with pytest.raises(StoreError, match="images/patch_tokens row 7 holds NaN"):
        next(model.search(store.path, "cat"))


def test_blocks_are_all_rows_once_and_not_copied(store: FeatureStore) -> None:
    field = store.images["patch_tokens"]
    found = list(field.blocks(2, ahead=1))
    assert [first for first, _ in found] == [0, 2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 22]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in found]), field[:])
    assert not any(rows.flags.owndata or rows.flags.writeable for _, rows in found)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# --- the model's method ---------------------------------------------------------------------------


def test_a_search_agrees_with_segmentation_scores(
    model: Talk2DINO, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are `segment`'s, a picture's the mean of its best patches; calibrated likewise."""
    tokens = torch.from_numpy(store.images["patch_tokens"][:]).flatten(0, 1)
    words = ["cat", "dog"]
    rows = model.embed_classes(words).rows
    made = Calibration.of(tokens, unit_rows(9), MeanOffset(), model.vision, model.projection)
    for calibration, offsets in ((None, np.zeros(2)), (made, made.apply(rows)[1].numpy())):
        monkeypatch.setattr(model, "calibration", calibration)
        found = list(model.search(store, words, top=4, best=2))
        scores = by_hand(store, rows) - offsets[:, None, None]
        assert [(one.query, one.rank) for one in found] == [
            (w, r) for w in words for r in (1, 2, 3, 4)
        ]
        for one in found:
            patches = scores[words.index(one.query), one.row]
            assert one.grid is not None and one.id == 100 + one.row
            np.testing.assert_allclose(one.grid.flatten().numpy(), sigmoid(patches), atol=1e-6)
            assert one.score == pytest.approx(sigmoid(np.sort(patches)[-2:].mean()), abs=1e-6)
            place = int(patches.argmax())
            assert one.patch == divmod(place, 2) and one.side == 32
            left, top = 16 * (place % 2), 16 * (place // 2)
            assert one.box == (left, top, left + 16, top + 16)
        for word in words:
            ranked = [one.score for one in found if one.query == word]
            assert ranked == sorted(ranked, reverse=True)


def test_grids_are_made_in_parts_and_for_their_query_alone(
    model: Talk2DINO, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held and computed does not grow with `top`, nor with the number of queries."""
    queries = {"pet": ["cat", "dog"], "sky": ["sky"], "road": ["road"]}
    want = [(one.query, one.rank, one.row, one.grid) for one in model.search(store, queries, top=9)]
    asked: list[tuple[int, int]] = []
    scores = Scan.scores

    def noted(self: Scan, tokens: NDArray[Any], first: int = 0) -> torch.Tensor:
        asked.append((len(self.rows), len(tokens)))
        return scores(self, tokens, first)

    monkeypatch.setattr(module, "BLOCK", 2 * store.images["patch_tokens"].row_bytes)
    monkeypatch.setattr(Scan, "scores", noted)
    got = [(one.query, one.rank, one.row, one.grid) for one in model.search(store, queries, top=9)]
    assert [one[:3] for one in got] == [one[:3] for one in want]
    for one, other in zip(got, want, strict=True):
        assert one[3] is not None and other[3] is not None
        torch.testing.assert_close(one[3], other[3], atol=1e-6, rtol=0)
    passed = -(-5 // 2) * 4 + 2  # shards of five pictures, the last of three, in twos
    assert set(asked[:passed]) <= {(4, 2), (4, 1)}
    assert asked[passed:] == [(n, m) for n in (2, 1, 1) for m in (2, 2, 2, 2, 1)]


def test_texts_embeddings_and_lists_mean_the_same(
    model: Talk2DINO, store: FeatureStore, tmp_path: Path
) -> None:
    def rows(queries: Any) -> list[int]:
        return [one.row for one in model.search(store.path, queries, top=5)]

    kept = model.embed_classes(["a cat, on a sofa"]).save(tmp_path / "q.safetensors")
    want = rows("a cat, on a sofa")
    assert want == rows(["a cat, on a sofa"]) == rows(kept) == rows(str(kept))
    merged = [one.query for one in model.search(store, {"pet": ["cat", "dog"]}, top=2)]
    assert merged == ["pet", "pet"]


def test_kept_patches_lie_where_they_were(model: Talk2DINO, tmp_path: Path) -> None:
    images, captions = tiny_arrays({"patch_tokens": (2, WIDTH)}, images=4, text_dim=8)
    images["patch_index"] = np.array([[0, 3], [1, 2], [2, 3], [0, 1]])
    write_store(tmp_path / "s", images, captions, vision=model.vision.describe())
    for one in model.search(tmp_path / "s", "cat", top=4):
        assert one.grid is not None
        kept = images["patch_index"][one.row].tolist()
        assert [not v for v in one.grid.flatten().isnan()] == [place in kept for place in range(4)]
        assert one.patch in [divmod(place, 2) for place in kept]


@pytest.mark.parametrize("name", ["disentangled_self_attn", "avg_self_attn_out"])
def test_pooled_stores_give_pictures_without_the_place(
    model: Talk2DINO, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2, WIDTH) if name.startswith("dis") else (WIDTH,)
    vision = model.vision.describe()
    store = FeatureStore(tiny_store(tmp_path / "s", {name: shape}, text_dim=8, vision=vision))
    monkeypatch.setattr(model, "calibration", "of patches, so it is not asked for these")
    found = list(model.search(store, "cat", top=5))
    heads = store.images[name][:].astype(np.float64).reshape(12, -1, WIDTH)
    heads /= np.linalg.norm(heads, axis=-1, keepdims=True)
    want = (heads @ model.embed_classes(["cat"]).rows[0].double().numpy()).max(-1)
    assert [one.row for one in found] == np.argsort(-want)[:5].tolist()
    assert {(one.grid, one.patch, one.box) for one in found} == {(None, None, None)}


def test_what_cannot_be_searched(model: Talk2DINO, store: FeatureStore, tmp_path: Path) -> None:
    named = {
        "top=0": (ConfigError, (store, "cat", 0)),
        "best=-1": (ConfigError, (store, "cat", 5, -1)),
        "neither a word": (ConfigError, (store, " ")),
        "extract again": (StoreError, (tmp_path / "nowhere", "cat")),
    }
    tiny_store(
        tmp_path / "other",
        FIELDS,
        text_dim=8,
        vision=model.vision.describe() | {"weights_sha256": "1"},
    )
    tiny_store(tmp_path / "unnamed", FIELDS, text_dim=8)
    tiny_store(tmp_path / "cls", {"cls_token": (WIDTH,)}, vision=model.vision.describe())
    named |= {
        "same weights": (CheckpointError, (tmp_path / "other", "cat")),
        "does not name": (CheckpointError, (tmp_path / "unnamed", "cat")),
        "has none of patch_tokens": (StoreError, (tmp_path / "cls", "cat")),
    }
    for message, (kind, given) in named.items():
        with pytest.raises(kind, match=message):
            model.search(*given)  # type: ignore[arg-type]
    negative = model.embed_classes(["cat"], negatives=["sky"])
    with pytest.raises(ConfigError, match="negatives"):
        model.search(store, negative)


def test_recall_by_hand(model: Talk2DINO, store: FeatureStore) -> None:
    """Both figures from all scores, sorted."""
    found = recall(store, model.projection, Dense(), best=2)
    text = torch.from_numpy(store.captions["embedding"][:]).float()
    with torch.no_grad():
        rows = F.normalize(model.projection.project_text(text), dim=-1)
    cosines = by_hand(store, rows)
    tokens = store.images["patch_tokens"][:].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    weights = np.exp(cosines / 0.1)
    pooled = np.einsum("nip,ipd->nid", weights, tokens)
    pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
    dense = np.einsum("nid,nd->ni", pooled, rows.double().numpy())
    for name, scores in (("search", np.sort(cosines)[..., -2:].mean(-1)), ("training", dense)):
        ranks = (scores >= np.diag(scores)[:, None]).sum(1)  # a caption for each image
        for k in (1, 5, 10):
            want = 100 * (ranks <= k).mean()
            assert found[name][f"text_to_image/recall@{k}"] == pytest.approx(want)
