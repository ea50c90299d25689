"""Features that the original extracted, as one .pth or as tars, converted into a store."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talk2dino.encoders.attention import pool_attention
from talk2dino.errors import ConfigError, DataError, StoreError, UserError
from talk2dino.features import FeatureStore
from talk2dino.features.from_original import FeatureFile, FeatureTars, convert_features, logits
from tests.helpers.pipeline import fails, files_below, run

D, H, P, C, L, W = 8, 2, 9, 6, 5, 4
IMAGES = 7  # the sixth has no caption, the fourth no features
Data = dict[str, list[dict[str, Any]]]


def feature_data(images: int = IMAGES, dense: bool = False, **more: object) -> Data:
    """What dino_extraction_v2.py and text_features_extraction.py put together."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    data: Data = {"images": [], "annotations": [], "info": [], "licenses": []}
    text = draw(3 * images, C)  # on the CPU, the original stores views of the whole batch
    for n in range(images):
        image: dict[str, Any] = {"id": 100 + n, "file_name": f"COCO_{n}.jpg", "height": 3}
        if n != 3:
            maps = draw(H, P)
            image |= {"avg_self_attn_out": draw(D), "disentangled_self_attn": draw(H, D)}
            if dense:
                image |= {"dino_features": draw(D), "patch_tokens": draw(P, D)}
                image |= {"self_attn_maps": maps.softmax(-1), "second_last_out": draw(D)}
                image["raw_maps"] = maps
        data["images"].append(image)
    for k in range(3 * images):  # captions of one image do not stand together
        if k % images == 5:
            continue
        row = {"id": 1000 + k, "image_id": 100 + k % images, "caption": f"caption {k}"}
        row["ann_feats"] = text[k].half()
        if dense:
            mask = torch.arange(L) < 2 + k % 3
            row |= {"clip_txt_out_tokens": draw(L, C).half(), "text_input_mask": mask}
            row |= {"clip_second_last_out": draw(L, W), "text_argmax": torch.tensor(1 + k % 3)}
        data["annotations"].append(row | more)
    return data


def save(data: object, path: Path, **options: object) -> Path:
    torch.save(data, path, **options)
    return path


def rows(data: Data) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Images that the store keeps, and their captions."""
    kept = [image for n, image in enumerate(data["images"]) if n not in (3, 5)]
    return kept, [[a for a in data["annotations"] if a["image_id"] == i["id"]] for i in kept]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dense", [False, True])
def test_every_value_arrives(tmp_path: Path, dtype: str, dense: bool) -> None:
    data = feature_data(dense=dense)
    file = FeatureFile(save(data, tmp_path / "train.pth"))
    convert_features(file, tmp_path / "store", dtype=dtype, images_per_shard=2)
    store = FeatureStore(tmp_path / "store")
    assert store.verify() == []
    images, captions = rows(data)
    assert store.images["id"][:].tolist() == [image["id"] for image in images]
    assert store.images["file_name"][:].tolist() == [image["file_name"] for image in images]
    flat = [row for group in captions for row in group]
    assert store.captions["id"][:].tolist() == [row["id"] for row in flat]
    assert store.captions["text"][:].tolist() == [row["caption"] for row in flat]
    owners = store.images["id"][store.captions["image_row"][:]]
    assert owners.tolist() == [row["image_id"] for row in flat]
    names = {"avg_self_attn_out": "avg_self_attn_out", "ann_feats": "embedding"}
    names["disentangled_self_attn"] = "disentangled_self_attn"
    if dense:
        names |= {"dino_features": "cls_token", "patch_tokens": "patch_tokens"}
        names |= {"second_last_out": "second_last_out", "clip_txt_out_tokens": "token_embeddings"}
        names |= {"text_input_mask": "token_mask", "clip_second_last_out": "second_last_tokens"}
        names["text_argmax"] = "eot_index"
    for theirs, ours in names.items():
        table, given = (store.images, images) if theirs in images[0] else (store.captions, flat)
        want = torch.stack([row[theirs] for row in given]).numpy()
        got = table[ours][:]
        assert got.dtype == (want.dtype if want.dtype.kind in "bi" else dtype)
        np.testing.assert_array_equal(got, want.astype(got.dtype))


def test_maps_behind_the_softmax_become_logits(tmp_path: Path) -> None:
    """They pool to the same as the raw maps: per head, and with the mean of the heads' logits."""
    data = feature_data(dense=True)
    file = FeatureFile(save(data, tmp_path / "train.pth"))
    convert_features(file, tmp_path / "store", dtype="float32")
    got = torch.from_numpy(FeatureStore(tmp_path / "store").images["self_attn_maps"][:])
    kept = rows(data)[0]
    raw = torch.stack([image["raw_maps"] for image in kept])
    tokens = torch.stack([image["patch_tokens"] for image in kept])
    for average in (False, True):
        torch.testing.assert_close(
            pool_attention(tokens, got, head_average=average),
            pool_attention(tokens, raw, head_average=average),
        )
    np.testing.assert_array_equal(logits(raw[0].numpy()), raw[0].numpy())  # raw maps stay
    assert np.isfinite(logits(np.array([[1.0, 0.0]], "f4"))).all()


def test_skipped_images_are_listed(tmp_path: Path) -> None:
    file = FeatureFile(save(feature_data(), tmp_path / "train.pth"))
    manifest = convert_features(file, tmp_path / "store", split="val", images_per_shard=1)
    assert manifest.skipped == 1
    assert [shard.images for shard in manifest.shards] == [1, 1, 1, 0, 1, 1]
    (line,) = (tmp_path / "store" / "val-skipped.jsonl").read_text().splitlines()
    item = json.loads(line)
    assert item == {
        "index": 3,
        "file_name": "COCO_3.jpg",
        "reason": "has no avg_self_attn_out",
    }


def test_a_stopped_conversion_continues(tmp_path: Path) -> None:
    path = save(feature_data(), tmp_path / "train.pth")
    convert_features(FeatureFile(path), tmp_path / "whole", images_per_shard=2)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise StopError

    with pytest.raises(StopError):
        convert_features(FeatureFile(path), tmp_path / "s", images_per_shard=2, advance=stop)
    assert not (tmp_path / "s" / "manifest.json").exists()
    before = (tmp_path / "s" / "train-00001.h5").stat().st_mtime_ns
    with pytest.raises(StoreError, match="begun with images_per_shard=2, now images_per_shard=3"):
        convert_features(FeatureFile(path), tmp_path / "s", images_per_shard=3)
    convert_features(FeatureFile(path), tmp_path / "s", images_per_shard=2)
    assert (tmp_path / "s" / "train-00001.h5").stat().st_mtime_ns == before
    assert files_below(tmp_path / "s") == files_below(tmp_path / "whole")
    with pytest.raises(StoreError, match="already holds a store"):
        convert_features(FeatureFile(path), tmp_path / "s", images_per_shard=2)


def test_another_file_of_the_same_size_is_not_gone_on_with(tmp_path: Path) -> None:
    """Features of another model: equal shapes make files of equal size."""

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    first, second = feature_data(), feature_data()
    second["images"][0]["avg_self_attn_out"] += 1
    sizes = set()
    for data in (first, second):
        sizes.add(save(data, tmp_path / "train.pth").stat().st_size)
        kind = (StopError, "") if data is first else (StoreError, "begun with source")
        with pytest.raises(kind[0], match=kind[1]):
            source = FeatureFile(tmp_path / "train.pth")
            convert_features(source, tmp_path / "s", images_per_shard=2, advance=stop)
    assert len(sizes) == 1


def write_tars(data: Data, folder: Path, per_tar: int) -> Path:
    """The original's `create_webdataset_single_shard`: one .pth of both dicts per image."""
    folder.mkdir()
    last = {row["image_id"]: row for row in data["annotations"]}
    images = [image for image in data["images"] if image["id"] in last]
    for number, start in enumerate(range(0, len(images), per_tar)):
        with tarfile.open(folder / f"shard{number:05d}.tar", "w") as tar:
            for image in images[start : start + per_tar]:
                merged = last[image["id"]] | {k: v for k, v in image.items() if k != "id"}
                buffer = io.BytesIO()
                torch.save(merged, buffer)
                info = tarfile.TarInfo(f"{image['id']}.pth")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return folder


@pytest.mark.parametrize("per_tar", [1, 3, 10])
def test_tars_hold_every_sample(tmp_path: Path, per_tar: int) -> None:
    data = feature_data()
    folder = write_tars(data, tmp_path / "tars", per_tar)
    found = sorted(folder.iterdir())
    manifest = convert_features(FeatureTars(found), tmp_path / "store", images_per_shard=4)
    store = FeatureStore(tmp_path / "store")
    images = rows(data)[0]
    assert store.images["id"][:].tolist() == [image["id"] for image in images]
    want = torch.stack([image["disentangled_self_attn"] for image in images]).half()
    np.testing.assert_array_equal(store.images["disentangled_self_attn"][:], want.numpy())
    last = {row["image_id"]: row for row in data["annotations"]}
    assert store.captions["id"][:].tolist() == [last[image["id"]]["id"] for image in images]
    assert manifest.skipped == 1


def test_keys_of_cc3m_become_numbers(tmp_path: Path) -> None:
    data = feature_data(4)
    for row in data["images"]:
        row["id"] = f"{row['id']:09d}" if row["id"] != 102 else "abc"
    for row in data["annotations"]:
        row["image_id"] = "abc" if row["image_id"] == 102 else f"{row['image_id']:09d}"
        row["id"] = row["image_id"]
    folder = write_tars(data, tmp_path / "tars", 4)
    convert_features(FeatureTars(sorted(folder.iterdir())), tmp_path / "store")
    assert FeatureStore(tmp_path / "store").images["id"][:].tolist() == [100, 101, 2]


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(feature_data(), tmp_path / "train.pth")
    named = ("vision=dinov2_vits14", "text=clip_vitb16", "split=train")
    run("convert", "features", f"input={path}", f"store={tmp_path / 's'}", *named)
    out = capfd.readouterr().out
    assert "1 images without features were skipped" in out
    assert f"{tmp_path / 's'}: 5 images, 15 captions, 1 shards" in out
    store = FeatureStore(tmp_path / "s")
    assert store.vision is not None and store.text is not None
    assert (store.vision.embed_dim, store.vision.num_heads) == (D, H)
    assert store.vision.spec["_target_"].endswith("TimmVisionEncoder")
    assert (store.text.name, store.text.embed_dim) == ("ViT-B-16-quickgelu", C)
    write_tars(feature_data(), tmp_path / "tars", 4)
    pattern = f"{tmp_path}/tars/shard{{00000..00001}}.tar"  # quoted for Hydra by the command
    run("convert", "tars", f"input={pattern}", f"store={tmp_path / 't'}", "dtype=float32")
    assert "vision: not named; say it with vision=…" in capfd.readouterr().out
    assert FeatureStore(tmp_path / "t").images["avg_self_attn_out"].dtype == np.float32
    assert "already holds a store" in fails(
        capfd, "convert", "features", f"input={path}", f"store={tmp_path / 's'}"
    )


def damaged(tmp_path: Path, change: object) -> Path:
    data = feature_data()
    change(data)  # type: ignore[operator]
    return save(data, tmp_path / "train.pth")


def pop(kind: str, number: int, key: str) -> object:
    return lambda data: data[kind][number].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("annotations"), "no list 'annotations'"),
        (pop("images", 1, "id"), r"images\[1\] has no id"),
        (pop("annotations", 2, "caption"), r"annotations\[2\] has no caption"),
        (pop("annotations", 2, "ann_feats"), "an annotation of image 102 has no ann_feats"),
        (
            lambda data: [row.pop("ann_feats") for row in data["annotations"]],
            r"annotation 1000 has none of .*text_features_extraction",
        ),
        (
            lambda data: data["images"].__setitem__(
                slice(None), [{"id": 100 + n, "file_name": ""} for n in range(IMAGES)]
            ),
            "none of 6 images has any of .*dino_extraction_v2",
        ),
        (lambda data: data["images"][1].update(id=100), "image id 100 occurs twice"),
        (
            lambda data: data["annotations"][0].update(image_id=5),
            "annotation 1000 names image 5, which is not in its images",
        ),
        (
            lambda data: data["images"][1].update(avg_self_attn_out=torch.full((D,), torch.nan)),
            r"train-00000\.h5: images/avg_self_attn_out is not finite in float16 for id=101",
        ),
        (
            lambda data: data["annotations"][0].update(ann_feats=torch.full((C,), 1e6)),
            r"captions/embedding is not finite in float16 for id=1000",
        ),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, change: object, message: str) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        convert_features(FeatureFile(path), tmp_path / "store")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_one_embedding_is_chosen(tmp_path: Path) -> None:
    bert = {"bert-base_features": torch.ones(3)}
    path = save(feature_data(**bert), tmp_path / "train.pth")
    with pytest.raises(DataError, match="ann_feats and bert-base_features; say which"):
        convert_features(FeatureFile(path), tmp_path / "store")
    convert_features(FeatureFile(path), tmp_path / "store", embedding="bert-base_features")
    assert FeatureStore(tmp_path / "store").captions["embedding"].shape == (15, 3)
    with pytest.raises(DataError, match="embedding=text_features: the annotations have"):
        convert_features(FeatureFile(path), tmp_path / "other", embedding="text_features")


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    class Thing:
        pass

    path = tmp_path / "a.pth"
    with pytest.raises(DataError, match=r"a\.pth: no such file"):
        FeatureFile(path)
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a\.pth: cannot be loaded safely"):
        FeatureFile(path)
    save({"images": [torch.nn.Linear(1, 1)], "annotations": []}, path)
    with pytest.raises(DataError, match=r"a\.pth: cannot be loaded safely"):
        FeatureFile(path)
    whole = save(feature_data(), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.pth: cannot be loaded safely"):
        FeatureFile(path)
    save(feature_data(), path, _use_new_zipfile_serialization=False)  # before torch 1.6
    assert len(FeatureFile(path)) == 6
    with pytest.raises(ConfigError, match="dtype='int8'"):
        convert_features(FeatureFile(path), tmp_path / "s", dtype="int8")
    tar = write_tars(feature_data(), tmp_path / "tars", 9) / "shard00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"shard00000\.tar: is cut off or damaged"):
        FeatureTars([tar])
