"""`python -m talk2dino.search`: two files, thumbnails, recall, what is refused before a model."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import read_checkpoint
from talk2dino.alignment.similarity import Dense, DotProduct
from talk2dino.datasets.captions import PictureFolder, WebDataset
from talk2dino.datasets.captions.base import crop_square, from_square
from talk2dino.errors import DataError, StoreError
from talk2dino.features import FeatureStore, write_store
from talk2dino.finding.found_files import HEIGHT, WIDEST, Pictures, _thumbnail
from talk2dino.finding.recall import check_recall
from talk2dino.finding.scan import Found
from talk2dino.inference.model import Talk2DINO as Model
from talk2dino.search import query_words
from tests.helpers.pipeline import fails, run
from tests.helpers.stores import ENCODERS, extract, tiny_store

SIDE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes with a caption each, in a folder below."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    (folder / "deep").mkdir()
    for number in range(6):
        shape = ((40, 90), (120, 50), (70, 70))[number % 3]
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "deep" / f"{number}.png")
    lines = [f'deep/{number}.png,"a thing, number {number}"' for number in range(6)]
    (folder / "captions.csv").write_text("\n".join(["file_name,caption", *lines]))
    return folder


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "store"
    return extract(photos, folder, "features=all", f"vision.image_size={SIDE}")


@pytest.fixture(scope="module")
def psi(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("psi")
    run(
        "train",
        *("experiment=vits_dense", f"store={store}", "projection.text_dim=256"),
        *("projection.vision_dim=64", "data.val_fraction=0", "data.batch_size=3", "trainer=cpu"),
        *("trainer.max_epochs=1", "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"),
        "scheduler.warmup_steps=1",
    )
    return folder


def read(folder: Path) -> Any:
    return json.loads((folder / "found.json").read_text())


def test_pictures_places_and_thumbnails(
    store: Path, psi: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("search", f"store={store}", f"checkpoint={psi}", f"output={out}", "top=4")
    run(*command, "query=a cat, on a sofa", f"images={photos}")
    assert "a cat, on a sofa" in capfd.readouterr().out
    model = Talk2DINO.from_pretrained(psi, "cpu")
    want = list(model.search(store, "a cat, on a sofa", top=4))
    content = read(out)
    assert content["images"] == 6 and content["field"] == "patch_tokens"
    [query] = content["queries"]
    assert query["query"] == "a cat, on a sofa"
    for one, entry in zip(want, query["found"], strict=True):
        assert (entry["file_name"], entry["row"]) == (one.file_name, one.row)
        assert entry["patch"] == list(one.patch or ()) and entry["square"] == list(one.box or ())
        with Image.open(photos / entry["file_name"]) as picture:
            left, top, right, bottom = entry["box"]
            assert 0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height
        np.testing.assert_allclose(entry["grid"], one.grid, atol=1e-4)
    page = (out / "found.html").read_text()
    pictures = re.findall(r'base64,([^"]+)"', page)
    assert len(pictures) == 4
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as thumbnail:
        assert thumbnail.height == 200
    run(*command, 'query=["x [/b] :cat:","sofa; couch"]')  # ours, so it is replaced
    assert [one["query"] for one in read(out)["queries"]] == ["x [/b] :cat:", "sofa"]
    assert read(out)["queries"][0]["found"][0]["box"] is None
    said = capfd.readouterr().out
    assert "images=DIR gives those of the pictures" in said and "x [/b] :cat:" in said
    (tmp_path / "queries.txt").write_text("background\r\n\n#1 fan\n<script>\n")
    run(*command, f"query={tmp_path / 'queries.txt'}")
    assert [one["query"] for one in read(out)["queries"]] == ["background", "#1 fan", "<script>"]
    assert "<script>" not in (out / "found.html").read_text()


def test_pictures_that_are_not_there_are_listed(
    store: Path, psi: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "deep" / "2.png").unlink()
    (tmp_path / "some" / "deep" / "3.png").write_bytes(b"no picture")
    (tmp_path / "some" / "deep" / "4.png").unlink()
    (tmp_path / "some" / "deep" / "4.png").symlink_to(photos / "deep" / "4.png")
    given = (f"store={store}", f"checkpoint={psi}", f"output={tmp_path / 'out'}")
    run("search", *given, "query=cat", f"images={tmp_path / 'some'}")
    said = capfd.readouterr().err
    assert "2 pictures could not be read" in said  # a link is followed
    for reason in ("2.png: not in this folder", "3.png: "):
        assert f"deep/{reason}" in said
    for name in ("../photos/deep/1.png", str(photos / "deep" / "1.png")):
        missing: dict[str, str] = {}
        asked = Found("cat", 1, 0.5, 0, 0, name, None)
        assert Pictures(tmp_path / "some").read(asked, missing, drawn=True) == (None, None)
        assert missing == {name: "lies outside of the folder"}
    page = (tmp_path / "out" / "found.html").read_text()
    assert "2 pictures could not be read" in page
    assert page.count("base64,") == 6  # of those the map of scores alone


@pytest.mark.parametrize("grid", [None, torch.ones(4, 4)])
def test_thumbnails_of_strips_are_small(grid: torch.Tensor | None) -> None:
    found = Found("cat", 1, 0.5, 0, 0, "a.png", grid, SIDE)
    uri = _thumbnail(found, Image.new("RGB", (5000, 1)), (0.0, 1.0))
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as made:
        assert made.height == HEIGHT and made.width <= 2 * (WIDEST + 1) * HEIGHT + 4


def test_recall_of_the_captions(
    store: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = (f"store={store}", f"checkpoint={psi}", f"output={tmp_path / 'out'}")
    run("search", *given, "recall=true")
    said = capfd.readouterr().out
    assert "recall, search: @1 " in said and "recall, training: @1 " in said
    content = read(tmp_path / "out")
    assert content["queries"] == [] and content["recall"].keys() == {"search", "training"}
    assert "Captions that find their picture" in (tmp_path / "out" / "found.html").read_text()


def test_pictures_without_captions_are_found_and_train_nothing(
    photos: Path, store: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same features as with captions, so the same results; no text encoder is built."""
    alone = tmp_path / "alone"
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / ".hidden").mkdir()
    shutil.copy(photos / "deep" / "1.png", tmp_path / "photos" / ".hidden" / "1.png")
    given = ("source=pictures", f"source.images={tmp_path / 'photos'}", "text.name=nonesuch")
    vision = (*ENCODERS[:3], "features=all", f"vision.image_size={SIDE}", "num_workers=0")
    run("extract", *given, *vision, f"store={alone}", "images_per_shard=4")
    said = " ".join(capfd.readouterr().out.split())
    assert "no text encoder" in said and "6 images, 0 captions" in said
    assert "1 files are left out, such as captions.csv (is no picture)" in said
    found, other = FeatureStore(alone), FeatureStore(store)
    assert found.verify() == [] and found.text is None and not found.captions.fields
    assert len(found.manifest.shards) == 2
    for name in found.images.fields:
        np.testing.assert_array_equal(found.images[name][:], other.images[name][:])
    asked = (f"checkpoint={psi}", "query=a cat", f"images={photos}")
    for where in (alone, store):
        run("search", *asked, f"store={where}", f"output={tmp_path / where.name / 'out'}")
    results = [read(tmp_path / where.name / "out")["queries"] for where in (alone, store)]
    assert results[0] == results[1]
    line = fails(capfd, "search", *asked, f"store={alone}", "recall=true")
    assert "holds no captions, so recall=true has no queries" in line
    line = fails(capfd, "train", "experiment=vits_dense", f"store={alone}", "trainer=cpu")
    assert "holds no captions; train on" in line
    widths = ("projection.text_dim=256", "projection.vision_dim=64")
    with_captions = (f"store={store}", f"val_store={alone}", "trainer=cpu", *widths)
    line = fails(capfd, "train", "experiment=vits_dense", *with_captions)
    assert "alone: holds no captions, only pictures to search" in line


def test_what_is_no_picture_of_a_folder_is_listed(photos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").touch()
    with pytest.raises(DataError, match=r"no picture in this folder \(a\.txt: is no picture\)"):
        PictureFolder(str(mine))
    (mine / "b.heif").touch()
    (mine / "linked").symlink_to(photos / "deep")
    (mine / "round").symlink_to(mine)
    (mine / "dead.png").symlink_to(mine / "nowhere.png")
    shutil.copy(photos / "deep" / "1.png", mine / "Z.PNG")
    source = PictureFolder(str(mine))
    names = [source.entry(number).file_name for number in range(len(source))]
    reasons = {one["file_name"]: one["reason"] for one in source.left_out}
    if "b.heif" in reasons:  # without its decoder
        assert next(iter(reasons)) == "b.heif" and "talk2dino[heic]" in reasons["b.heif"]
    assert [name for name in names if name != "b.heif"] == ["Z.PNG", "dead.png"]
    assert reasons["linked"] == reasons["round"] == "is a link to a folder, which is not followed"
    assert reasons["a.txt"] == "is no picture" and source.caption_count() == 0
    with open(bytes(mine) + b"/\xff.png", "wb"):  # noqa: PTH123
        pass
    again = PictureFolder(str(mine))
    assert {"file_name": "?.png", "reason": "its name is no UTF-8"} in again.left_out
    assert again.fingerprint() == source.fingerprint()


def test_thumbnails_come_out_of_tars_too(
    photos: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(2):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for name in range(3 * number, 3 * number + 3):
                tar.add(photos / "deep" / f"{name}.png", f"{name}.png")
                (tmp_path / "a.txt").write_text("a thing")
                tar.add(tmp_path / "a.txt", f"{name}.txt")
    store = tmp_path / "store"
    common = (*ENCODERS, "features=all", f"vision.image_size={SIDE}", "num_workers=0")
    run("extract", "source=webdataset", f"source.tars={tars}", *common, f"store={store}")
    given = (f"store={store}", f"checkpoint={psi}", f"output={tmp_path / 'out'}", "query=cat")
    run("search", *given, f"images={tars}")
    assert "could not be read" not in capfd.readouterr().err
    for entry in read(tmp_path / "out")["queries"][0]["found"]:
        name = Path(entry["file_name"]).name
        with Image.open(photos / "deep" / name) as picture:
            square = (entry["square"], SIDE, picture.size[::-1])
            assert entry["box"] == list(from_square(*square))
    (tars / "1.tar").unlink()
    (tars / "0.tar").write_bytes((tars / "0.tar").read_bytes()[:3000])
    run("search", *given, f"images={tars}")
    said = capfd.readouterr().err
    assert "6 pictures could not be read" in said
    assert "1.tar/3.png: not in this folder" in said and "0.tar: is cut off" in said


def test_tars_of_one_name_are_told_apart(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a thing")
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "0.tar", "w") as tar:
            tar.add(photos / "deep" / f"{number}.png", "./x/1.png")
            tar.add(tmp_path / "a.txt", "./x/1.txt")
    source = WebDataset([str(tmp_path / folder / "0.tar") for folder in ("a", "b")])
    names = [source.entry(number).file_name for number in range(2)]
    assert names == ["a/0.tar/./x/1.png", "b/0.tar/./x/1.png"]
    for number, name in enumerate(names):
        asked, missing = Found("cat", 1, 0.5, 0, 0, name, None), dict[str, str]()
        picture, size = Pictures(tmp_path).read(asked, missing, drawn=True)
        want = source.image(number)
        assert not missing and size == want.size[::-1] and picture is not None
        np.testing.assert_array_equal(picture, want)


def test_large_photographs_are_read_small(tmp_path: Path) -> None:
    large = Image.fromarray(np.full((3000, 4000, 3), 90, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    large.save(tmp_path / "a.jpg", exif=exif)
    asked = Found("cat", 1, 0.5, 0, 0, "a.jpg", torch.ones(4, 4), SIDE)
    picture, size = Pictures(tmp_path).read(asked, {}, drawn=True)
    assert size == (4000, 3000) and picture is not None and picture.size == (750, 1000)
    assert Pictures(tmp_path).read(asked, {}, drawn=False) == (None, (4000, 3000))


def test_recall_is_refused_where_it_cannot_be_had(
    psi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = read_checkpoint(psi).projection
    sizes = {"patch_tokens": np.ones((3, 4, 64), np.float16)}
    for name, rows in (("gap", [0, 1, 1]), ("whole", [0, 1, 2])):
        captions = {"image_row": rows, "embedding": np.ones((3, 256))}
        write_store(tmp_path / name, sizes, captions)
    with pytest.raises(DataError, match=r"image row 2 has no caption \(1 such images\)"):
        check_recall(FeatureStore(tmp_path / "gap"), projection, Dense())
    whole = FeatureStore(tmp_path / "whole")
    check_recall(whole, projection, Dense())
    with pytest.raises(StoreError, match=r"holds no avg_self_attn_out.*val_similarity=pooled"):
        check_recall(whole, projection, DotProduct("avg_self_attn_out"))
    monkeypatch.setattr("talk2dino.finding.recall.machine_memory", lambda: 89)
    with pytest.raises(DataError, match="3 captions by 3 images take"):
        check_recall(whole, projection, Dense())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("a man, on a bicycle", {"a man, on a bicycle": ("a man, on a bicycle",)}),
        ("sofa; couch", {"sofa": ("sofa", "couch")}),
        ("['what is robots.txt']", {"what is robots.txt": ("what is robots.txt",)}),
        ("q.json", {"background": ("background",), "sofa": ("sofa", "couch")}),
        ("entries.json", {"background": ("background",), "cat": ("kitty",)}),
    ],
)
def test_queries_arrive_as_typed(
    given: str, want: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.json").write_text('["background", ["sofa", "couch"]]')
    (tmp_path / "entries.json").write_text('["background", {"name": "cat", "synonyms": ["kitty"]}]')
    assert query_words(given) == want
    with pytest.raises(DataError, match=r"no such file; to look for these words: query=\['what"):
        query_words("what is robots.txt")


def test_recall_is_refused_for_other_weights(
    store: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vision = FeatureStore(store).vision
    assert vision is not None
    fields = {"patch_tokens": (16, 64)}
    other = tiny_store(
        tmp_path / "other", fields, text_dim=64, vision=vars(vision) | {"weights_sha256": "1"}
    )
    asked = (f"store={other}", f"checkpoint={psi}", f"output={tmp_path / 'out'}", "recall=true")
    line = fails(capfd, "search", *asked)
    assert "with the same weights; extract with that" in line


def test_pooled_stores_are_said_to_be_without_places(
    photos: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = extract(photos, tmp_path / "store", "features=pooled", f"vision.image_size={SIDE}")
    given = (f"store={store}", f"checkpoint={psi}", f"output={tmp_path / 'out'}")
    run("search", *given, "query=cat", "recall=true", "val_similarity=pooled", f"images={photos}")
    assert "places are not" in capfd.readouterr().out
    found = read(tmp_path / "out")
    assert found["field"] == "disentangled_self_attn" and "places are not" in found["note"]
    assert {one["grid"] for one in found["queries"][0]["found"]} == {None}
    assert (tmp_path / "out" / "found.html").read_text().count("base64,") == 6


def test_what_cannot_be_done_is_one_line(
    store: Path,
    psi: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Model, "from_pretrained", never)
    vision = FeatureStore(store).vision
    assert vision is not None
    other = vision.spec | {"name": "other_vit"}
    fields = {"patch_tokens": (16, 64)}
    tiny_store(tmp_path / "other", fields, vision=vars(vision) | {"spec": other})
    tiny_store(tmp_path / "narrow", {"patch_tokens": (16, 8)})
    tiny_store(tmp_path / "cls", {"cls_token": (64,)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "found.html").write_text("my own")
    (tmp_path / "dir" / "found.html").mkdir(parents=True)
    (tmp_path / "dir" / "found.json").write_text('{"written_by": "talk2dino.search"}')
    (tmp_path / "file").write_text("")
    for name, text in (("queries.txt", "\n"), ("queries.csv", "cat"), ("two.txt", "cat\ncat")):
        (tmp_path / name).write_text(text)
    asked = (f"checkpoint={psi}", f"store={store}", "query=cat", f"output={tmp_path / 'out'}")
    refused = {
        "checkpoint=…, store=…, query=… not given": [],
        "query=… not given": list(asked[:2]),
        "nowhere/manifest.json: not found": [*asked, "store=nowhere"],
        "features are of other_vit, not of": [*asked, f"store={tmp_path / 'other'}"],
        "holds features of width 8": [*asked, f"store={tmp_path / 'narrow'}"],
        "has none of patch_tokens": [*asked, f"store={tmp_path / 'cls'}"],
        "query: the list is empty": [*asked, "query=[]"],
        "queries.txt: is empty": [*asked, f"query={tmp_path / 'queries.txt'}"],
        "two.txt: 'cat' is named twice": [*asked, f"query={tmp_path / 'two.txt'}"],
        "queries.csv' is a file; a list is": [*asked, f"query={tmp_path / 'queries.csv'}"],
        "top=0: use 1 to": [*asked, "top=0"],
        "best=9999": [*asked, "best=9999"],
        "templates='nonesuch' is unknown": [*asked, "templates=nonesuch"],
        "images=nowhere: no such folder": [*asked, "images=nowhere"],
        "not written by this command": [*asked, f"output={tmp_path / 'mine'}"],
        "found.html: is there and was not written": [*asked, f"output={tmp_path / 'dir'}"],
        "cannot create this folder": [*asked, f"output={tmp_path / 'file'}"],
        "calibration=nowhere.safetensors: no such file": [
            *(*asked, "calibration=nowhere.safetensors"),
        ],
        "checkpoint=nowhere: no such file": [*asked, "checkpoint=nowhere"],
    }
    for message, given in refused.items():
        last = {one.partition("=")[0]: one for one in given}  # the later of two of one key
        line = fails(capfd, "search", *last.values())
        assert message in line, line
    assert (tmp_path / "mine" / "found.html").read_text() == "my own"


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (30, 700), (901, 37)])
def test_boxes_lie_where_the_square_was_cut(shape: tuple[int, int]) -> None:
    """A bright block of the picture is found in the square, and back in the picture."""
    height, width = shape
    side = min(shape)
    top, left = (height - side) // 2 + side // 4, (width - side) // 2 + side // 4
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top : top + side // 2, left : left + side // 2] = 255
    square = crop_square(Image.fromarray(pixels), SIDE)[0].numpy() > 127
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    found = np.array(from_square(box, SIDE, shape))
    want = np.array((left, top, left + side // 2, top + side // 2))
    assert np.abs(found - want).max() <= 1 + side / SIDE


def test_jobs_of_a_sweep_have_results_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`-m query=cat,dog` would leave the results of the dog alone."""
    monkeypatch.chdir(tmp_path)
    sweep = ("search", "-m", "checkpoint=nowhere", "store=nowhere", "query=cat,dog")
    said = fails(capfd, *sweep)
    assert said.startswith("output: the jobs of a sweep over query would write over each other")
    calibrations = ("calibrate", "-m", "checkpoint=a,b", "store=nowhere")  # each beside its own
    for allowed in ((*sweep, "output=found/${query}"), (*sweep, "output=out/${hydra:job.num}"),
                    calibrations):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(*allowed)
        assert stopped.value.code == 1  # each began, and found no store
        assert "2 failed" in capfd.readouterr().err
