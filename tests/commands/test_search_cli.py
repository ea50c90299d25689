"""`python -m talk2dino.search`: two files, thumbnails, recall, what is refused before a model."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.datasets.captions.base import crop_square, from_square
from talk2dino.features import FeatureStore
from talk2dino.finding.found_files import HEIGHT, WIDEST, _thumbnail
from talk2dino.finding.scan import Found
from talk2dino.inference.model import Talk2DINO as Model
from tests.helpers.pipeline import fails, run
from tests.helpers.stores import extract, tiny_store

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
    assert "3 pictures could not be read" in said
    for reason in ("2.png: not in this folder", "3.png: ", "4.png: lies outside"):
        assert f"deep/{reason}" in said
    page = (tmp_path / "out" / "found.html").read_text()
    assert "3 pictures could not be read" in page
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


def test_recall_is_refused_for_other_weights(
    store: Path, psi: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vision = FeatureStore(store).vision
    assert vision is not None
    fields = {"patch_tokens": (16, 64)}
    other = tiny_store(
        tmp_path / "other", fields, text_dim=64, vision=vars(vision) | {"weights_sha256": "1"}
    )
    line = fails(capfd, "search", f"store={other}", f"checkpoint={psi}", "recall=true")
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
        "images=nowhere: no such folder": [*asked, "images=nowhere"],
        "not written by this command": [*asked, f"output={tmp_path / 'mine'}"],
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
