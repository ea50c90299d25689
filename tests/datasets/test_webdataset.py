"""WebDataset tars as a source: every sample by offset, every fault named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from talk2dino.datasets.captions import Entry, WebDataset, webdataset
from talk2dino.datasets.captions.base import ImageBatch, ImageBatches
from talk2dino.datasets.mosaic import Mosaic
from talk2dino.datasets.tars import expand_tars, read_member, tar_members
from talk2dino.errors import ConfigError, DataError, UserError
from talk2dino.features import FeatureStore
from tests.helpers.pipeline import BUNDLED, TRAIN, need, run

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALK2DINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(color: int, suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (color, 10, 20)).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    return buffer.getvalue()


def sample(number: int, suffix: str = "png", **row: object) -> Files:
    text = {"txt": f"caption {number}".encode()} if not row else {"json": json.dumps(row).encode()}
    return {f"{number:09d}.{key}": data for key, data in ({suffix: picture(number)} | text).items()}


def write_tar(path: Path, files: Files | list[tuple[str, bytes]], kind: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, kind) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of three and two samples."""
    folder = tmp_path / "cc3m"
    write_tar(folder / "00000.tar", sample(0) | sample(1) | sample(2))
    write_tar(folder / "00001.tar", sample(3) | sample(4))
    return folder


def entries(source: WebDataset) -> list[Entry]:
    return [source.entry(index) for index in range(len(source))]


def red(source: WebDataset, index: int) -> int:
    return source.image(index).getpixel((0, 0))[0]


@pytest.mark.parametrize("how", ["range", "comma", "glob", "folder", "list", "files"])
def test_every_sample_of_every_tar(tars: Path, how: str) -> None:
    """The last sample of each tar included, which the original lost."""
    given: str | list[str] = {
        "range": f"{tars}/{{00000..00001}}.tar",
        "comma": f"{tars}/0000{{0,1}}.tar",
        "glob": f"{tars}/0*.tar",
        "folder": str(tars),
        "list": [f"{tars}/00000.tar", f"{tars}/*1.tar"],
        "files": [f"{tars}/00000.tar", f"{tars}/00001.tar"],
    }[how]
    source = WebDataset(given)
    assert entries(source) == [
        Entry(n, f"0000{n // 3}.tar/{n:09d}.png", ((n, f"caption {n}"),)) for n in range(5)
    ]
    assert [red(source, n) for n in (4, 0, 2, 3, 1)] == [4, 0, 2, 3, 1]
    assert source.caption_count() == 5
    with pytest.raises(IndexError):
        source.entry(5)


@pytest.mark.parametrize(
    ("row", "json_key", "captions"),
    [
        ({"caption": " a\n cat "}, None, ["a cat"]),
        ({"captions": ["a cat", "", "one cat"]}, None, ["a cat", "one cat"]),
        ({"caption": "no", "long": "a cat"}, "long", ["a cat"]),
        ({"caption": "no", "long": ["a", "b", "c"]}, "long", ["a", "b", "c"]),
        ({"caption": None, "captions": ["a cat"]}, None, ["a cat"]),
    ],
)
def test_captions_of_json(
    tmp_path: Path, row: dict[str, object], json_key: str | None, captions: list[str]
) -> None:
    write_tar(tmp_path / "a.tar", sample(0, **row) | sample(1, **row))
    source = WebDataset(str(tmp_path / "a.tar"), json_key=json_key)
    n = len(captions)
    assert [text for _, text in source.entry(1).captions] == captions
    assert [number for number, _ in source.entry(1).captions] == list(range(n, 2 * n))
    assert source.caption_count() == 2 * n


def test_text_goes_before_json_unless_a_key_is_said(tmp_path: Path) -> None:
    files = sample(0) | {"000000000.json": b'{"caption": "from json", "key": "000000000"}'}
    write_tar(tmp_path / "a.tar", files)
    path = str(tmp_path / "a.tar")
    assert WebDataset(path).entry(0).captions == ((0, "caption 0"),)
    source = WebDataset(path, json_key="caption")
    assert source.entry(0).captions == ((0, "from json"),)
    assert source.fingerprint() != WebDataset(path).fingerprint()


def test_a_caption_of_another_wording_is_another_source(tmp_path: Path) -> None:
    """Of the same length: neither the size of the tar nor any count tells."""
    found = []
    for text in (b"a cat", b"a dog"):
        path = write_tar(tmp_path / "a.tar", sample(0) | {"000000000.txt": text})
        found.append(WebDataset(str(path)).fingerprint())
    assert found[0].pop("content") != found[1].pop("content")
    assert found[0] == found[1]


def test_names_with_two_dots_are_listed(tmp_path: Path) -> None:
    odd = {"IMG_2.edited.png": picture(7), "IMG_2.edited.txt": b"a cat", "b.mask.png": picture(1)}
    source = WebDataset(str(write_tar(tmp_path / "a.tar", sample(0) | odd)))
    assert len(source) == 2 and source.entry(1).file_name.endswith("IMG_2.edited.png")
    with pytest.raises(OSError, match=r"no image .*before the first dot of a name is its key"):
        source.image(1)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_image_formats_and_names(tmp_path: Path, suffix: str) -> None:
    files = {
        "./part/1.a.b.txt": b"ignored: its extension is a.b.txt",
        f"./part/1.{suffix}": picture(200, suffix.lower()),
        "./part/1.txt": "Straße".encode("utf-8-sig"),
        "./part/._1.png": b"macOS",
        "part/README": b"no sample",
        "part/mask.npy": b"no sample either",
    }
    source = WebDataset(str(write_tar(tmp_path / "a.tar", files)))
    assert entries(source) == [Entry(0, f"a.tar/./part/1.{suffix}", ((0, "Straße"),))]
    assert abs(red(source, 0) - 200) < 9


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_formats(tmp_path: Path, kind: int) -> None:
    length = 90 if kind == tarfile.USTAR_FORMAT else 300
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for suffix, data in (("png", picture(5)), ("txt", b"x")):
            info = tarfile.TarInfo(f"d/{'k' * length}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = WebDataset(str(tmp_path / "a.tar"))
    assert source.entry(0) == Entry(0, f"a.tar/d/{'k' * length}.png", ((0, "x"),))
    assert red(source, 0) == 5


def test_samples_without_their_parts_are_listed(tmp_path: Path) -> None:
    files: Files = sample(0)
    files |= {"1.png": picture(1)}
    files |= {"2.txt": b"no image"}
    files |= {"3.png": picture(3), "3.txt": b" \n"}
    files |= {"4.png": picture(4), "4.json": b'{"text": "x"}'}
    files |= {"5.png": picture(5), "5.txt": b"\xff\xfe\xdf"}
    files |= {"6.png": picture(6)[:45], "6.txt": b"broken"}
    files |= {"7.png": picture(7), "7.json": b"{oops"}
    files |= {"8.png": picture(8), "8.json": b'{"caption": 3}'}
    files |= {"9.png": picture(9), "9.txt": b"last"}
    source = WebDataset(str(write_tar(tmp_path / "a.tar", files)))
    skipped = [ImageBatches(source, 6)[[n]].skipped for n in range(10)]
    reasons = [item[0]["reason"] if item else "" for item in skipped]
    assert [bool(reason) for reason in reasons] == [False, *[True] * 8, False]
    for reason, want in zip(
        reasons[1:-1],
        [
            "no caption: it has no .txt and no .json",
            "no image (jpg, jpeg, png, webp)",
            "its caption is empty",
            "its .json has no caption and no captions",
            "utf-8",
            "truncated",
            "Expecting property name",
            "its caption is no text",
        ],
        strict=True,
    ):
        assert want in reason
    assert source.entry(9).captions == ((3, "last"),)  # after those of 0, 2 and 6
    assert source.caption_count() == 4


def test_nothing_usable(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample(0, text="x") | {"1.txt": b"x"})
    with pytest.raises(DataError, match=r"no sample of .*a\.tar .*set source\.json_key"):
        WebDataset(str(path))
    assert WebDataset(str(path), json_key="text").entry(0).captions == ((0, "x"),)


def test_index_is_kept_until_the_tar_changes(
    tars: Path, _cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []

    def members(path: Path) -> Iterator[object]:
        listed.append(path)
        return tar_members(path)

    monkeypatch.setattr(webdataset, "tar_members", members)
    first = WebDataset(str(tars))
    assert len(listed) == 2
    again = WebDataset(str(tars))
    assert len(listed) == 2
    assert entries(again) == entries(first)
    write_tar(tars / "00001.tar", sample(3) | sample(5) | sample(6))
    assert entries(WebDataset(str(tars)))[-1].file_name == "00001.tar/000000006.png"
    assert listed[2:] == [tars / "00001.tar"]
    status = (tars / "00000.tar").stat()
    os.utime(tars / "00000.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    WebDataset(str(tars))
    assert listed[3:] == [tars / "00000.tar"]
    for file in _cache.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])  # damaged
    assert len(WebDataset(str(tars))) == 6
    monkeypatch.setenv("TALK2DINO_CACHE", str(tars / "00000.tar" / "x"))  # not writable
    assert len(WebDataset(str(tars))) == 6


def test_limit_opens_no_tar_too_many(tars: Path) -> None:
    (tars / "00001.tar").write_bytes(b"rubbish")
    source = WebDataset(str(tars), limit=2)
    assert [e.image_id for e in entries(source)] == [0, 1]
    assert source.caption_count() == 2
    assert source.fingerprint()["tars"] == 1
    with pytest.raises(ConfigError, match=r"source\.limit=0"):
        WebDataset(str(tars), limit=0)


def _reds(batch: ImageBatch) -> list[int]:
    return batch.pixels[:, 0, 0, 0].tolist()


def test_workers(tars: Path) -> None:
    """Forked; that a source also pickles, as spawned workers want, is the next test's."""
    source = WebDataset(str(tars))
    assert red(source, 0) == 0  # a file is open before the workers start
    loader = DataLoader(
        ImageBatches(source, 6),
        batch_size=None,
        sampler=[[0, 1], [2, 3], [4]],
        collate_fn=_reds,
        num_workers=2,
        multiprocessing_context="fork",
    )
    assert [value for batch in loader for value in batch] == [0, 1, 2, 3, 4]
    assert red(source, 4) == 4


def test_a_source_pickles(tars: Path) -> None:
    source = WebDataset(str(tars))
    assert [red(source, n) for n in (0, 4, 0, 4)] == [0, 4, 0, 4]
    assert pickle.loads(pickle.dumps(source)).entry(4) == source.entry(4)


def test_a_tar_that_shrinks_is_noticed(tars: Path) -> None:
    source = WebDataset(str(tars))
    (tars / "00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000\.tar: changed while being read"):
        source.entry(0)


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_every_cut_is_found(tmp_path: Path) -> None:
    """A download may stop anywhere; only a cut exactly between two members cannot be seen."""
    whole = write_tar(tmp_path / "whole.tar", sample(0) | sample(1)).read_bytes()
    members = list(tar_members(tmp_path / "whole.tar"))
    headers = [member.offset - 512 for member in members]
    ends = [member.offset + -(-member.size // 512) * 512 for member in members]
    path = tmp_path / "cut.tar"
    for size in range(1, ends[-1] - 1, 67):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tar: (no plain tar|is cut off or damaged)"):
            list(tar_members(path))
    for size in (*headers[1:], ends[-1], ends[-1] + 100, len(whole)):  # between members
        path.write_bytes(whole[:size])
        assert len(list(tar_members(path))) >= 1
    for header in headers[1:]:
        path.write_bytes(whole[:header] + b"\x07" * 512 + whole[header + 512 :])
        with pytest.raises(DataError, match="is cut off or damaged at byte"):
            list(tar_members(path))


def test_bad_tars_are_one_line(tars: Path, tmp_path: Path) -> None:
    def refused(given: str | list[str], message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            WebDataset(given)
        assert "\n" not in str(error.value)

    refused(f"{tars}/{{00000..00003}}.tar", r"source\.tars: .*00002\.tar: no such file")
    refused(f"{tars}/x*.tar", r"source\.tars=.*x\*\.tar: no file matches")
    refused([f"{tars}/00000.tar", str(tars)], r"00000\.tar is named twice")
    refused([], r"source\.tars=\[\]: names no tar")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), r"no \.tar in this folder")
    packed = write_tar(tmp_path / "packed.tar", sample(0), "w:gz")
    refused(str(packed), r"packed\.tar: no plain tar .*unpack")
    twice = write_tar(tmp_path / "twice.tar", [*sample(0).items(), ("000000000.txt", b"again")])
    refused(str(twice), r"twice\.tar: 000000000\.txt is in it twice")
    refused(str(cut(tars / "00001.tar", 1200)), r"00001\.tar: is cut off or damaged at byte")


def test_expansion_keeps_the_order(tmp_path: Path) -> None:
    for name in ("a8", "a9", "a10", "b1"):
        (tmp_path / f"{name}.tar").touch()
    got = expand_tars([f"{tmp_path}/a{{8..10}}.tar", f"{tmp_path}/{{b}}1.tar"], "input")
    assert [path.stem for path in got] == ["a8", "a9", "a10", "b1"]
    assert np.all([path.is_absolute() for path in got])


def test_reader_names_what_is_missing(tars: Path) -> None:
    with pytest.raises(OSError, match=r"00000\.tar: ends before byte"):
        read_member(tars / "00000.tar", 10**6, 5)


def test_from_tars_to_a_trained_projection(mosaic_store: Path, tmp_path: Path) -> None:
    """The scenes of `mosaic_store`'s first shard as tars: the same features, and a training."""
    need(*BUNDLED)
    scenes = Mosaic(count=24, image_size=112)
    for tar in range(2):
        files: Files = {}
        for number in range(4 * tar, 4 * tar + 4):
            buffer = io.BytesIO()
            scenes.image(number).save(buffer, "PNG")
            captions = [text for _, text in scenes.entry(number).captions]
            files[f"{number}.png"] = buffer.getvalue()
            files[f"{number}.json"] = json.dumps({"captions": captions}).encode()
        write_tar(tmp_path / f"{tar:05d}.tar", files)
    encoders = ("vision=dinov2_vits14", "vision.image_size=112", "text=minilm", "accelerator=cpu")
    run(
        "extract",
        "source=webdataset",
        f"source.tars={tmp_path}/{{00000..00001}}.tar",  # without quotes for Hydra
        *encoders,
        "images_per_shard=8",
        "num_workers=0",
        f"store={tmp_path / 'store'}",
        f"hydra.run.dir={tmp_path / 'extract'}",
    )
    got, want = FeatureStore(tmp_path / "store"), FeatureStore(mosaic_store)
    assert len(got.images) == 8
    captions = len(got.captions)
    for name in got.images.fields:
        if name != "file_name":
            np.testing.assert_array_equal(got.images[name][:], want.images[name][:8])
    for name in ("id", "image_row", "text", "embedding"):
        np.testing.assert_array_equal(got.captions[name][:], want.captions[name][:captions])
    run(
        "train",
        "experiment=quickstart",
        f"store={tmp_path / 'store'}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_epochs=1",
        *TRAIN,
        f"hydra.run.dir={tmp_path / 'train'}",
    )
    assert (tmp_path / "train" / "projection.safetensors").is_file()
