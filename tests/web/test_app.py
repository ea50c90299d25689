"""The web page, in a real browser; and what lies behind it, without one."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.app import page_words
from talk2dino.datasets.mosaic import MosaicScenes
from talk2dino.errors import ConfigError, DataError, ResultWarning
from talk2dino.inference.class_embeddings import ClassEmbeddings
from talk2dino.inference.exemplars import Exemplar, read_folder
from talk2dino.inference.model import Talk2DINO
from talk2dino.web.examples import MOST, SIDE, painted, to_paint_on
from talk2dino.web.session import (
    Request,
    View,
    add_example,
    annotation_files,
    answer,
    open_picture,
    python_call,
    scores_at,
)
from tests.helpers.pipeline import fails, need, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
SHORT_SIDE = 112


def test_a_name_that_is_no_word_of_its_class_is_said() -> None:
    with pytest.warns(ResultWarning, match="the page calls 'cat' by its first word, 'kitty'"):
        assert page_words({"cat": ["kitty", "tom"], "sky": ["sky"]}) == "kitty; tom, sky"


@pytest.mark.parametrize("word", ["salt, pepper", "a; b"])
def test_a_word_that_the_page_would_part_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="has a comma or semicolon, which part words"):
        page_words({"cat": ["cat"], word: [word]})


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Talk2DINO:
    return Talk2DINO.from_pretrained(trained_run, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of two concepts that the model was trained on."""
    scene = next(s for s in MosaicScenes("heldout", 8, 112, 168) if len(np.unique(s.labels)) == 2)
    path = tmp_path_factory.mktemp("web") / "scene.png"
    Image.fromarray(scene.image).save(path)
    return path


@pytest.fixture(scope="module")
def page(model: Talk2DINO) -> Iterator[str]:
    need("gradio")
    from talk2dino.web.page import Page, show_page

    blocks = Page(model, "outputs/run", "cat, grass", SHORT_SIDE).build()
    yield show_page(blocks, "127.0.0.1", None, max_upload_mb=0.5)
    blocks.close()


@pytest.fixture
def calibrated(trained_run: Path, mosaic_store: Path, tmp_path: Path) -> Talk2DINO:
    """What is painted wins over words only where both are calibrated."""
    folder = tmp_path / "run"
    folder.mkdir()
    weights = (trained_run / "projection.safetensors").read_bytes()
    (folder / "projection.safetensors").write_bytes(weights)
    run("calibrate", f"checkpoint={folder}", f"store={mosaic_store}", "tokens=500")
    return Talk2DINO.from_pretrained(folder, device="cpu")


@pytest.fixture
def calibrated_page(calibrated: Talk2DINO) -> Iterator[str]:
    from talk2dino.web.page import Page, show_page

    blocks = Page(calibrated, "outputs/run", "cat, grass", SHORT_SIDE).build()
    yield show_page(blocks, "127.0.0.1", None, max_upload_mb=0.5)
    blocks.close()


@pytest.fixture
def tab(page: str) -> Iterator[Any]:
    need("playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        tab.asked = []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(page)
        tab.wait_for_selector("#picture input[type=file]", state="attached")
        yield tab
        browser.close()


def shown(tab: Any) -> np.ndarray:
    """The overlay as the browser got it."""
    address = tab.locator("#overlay img").get_attribute("src")
    return np.asarray(Image.open(BytesIO(tab.request.get(address).body())).convert("RGB"))


def wait_for_another(tab: Any, before: str | None) -> None:
    changed = "old => { const i = document.querySelector('#overlay img'); return i?.src != old }"
    tab.wait_for_function(changed, arg=before)


def test_a_visit(tab: Any, page: str, model: Talk2DINO, photo: Path) -> None:
    tab.set_input_files("#picture input[type=file]", photo)
    tab.wait_for_selector("#overlay img")
    # What the page shows is what the Python call it prints gives, pixel for pixel.
    encoded = model.encode(photo, SHORT_SIDE)
    plain = model.segment(encoded, ["cat", "grass"], pamr=True)
    np.testing.assert_array_equal(shown(tab), np.asarray(plain.overlay()))
    assert (
        "model.segment('scene.png', ['cat', 'grass'], pamr=True, short_side=112)"
        in tab.inner_text("#code")
    )
    tab.wait_for_selector("#shares td:has-text('cat')")

    address = tab.locator("#overlay img").get_attribute("src")
    tab.check("#background input")
    wait_for_another(tab, address)
    cleaned = model.segment(encoded, ["cat", "grass"], background=0.5, pamr=True)
    np.testing.assert_array_equal(shown(tab), np.asarray(cleaned.overlay()))

    address = tab.locator("#overlay img").get_attribute("src")
    tab.fill("#threshold input[type=number]", "0.75")
    tab.press("#threshold input[type=number]", "Enter")
    wait_for_another(tab, address)
    nothing = cleaned.with_threshold(0.75)
    assert nothing.areas()["background"] == 1.0
    np.testing.assert_array_equal(shown(tab), np.asarray(nothing.overlay()))

    address = tab.locator("#overlay img").get_attribute("src")
    tab.uncheck("#background input")
    wait_for_another(tab, address)
    address = tab.locator("#overlay img").get_attribute("src")
    tab.uncheck("#shown label:has-text('grass') input")
    wait_for_another(tab, address)
    np.testing.assert_array_equal(shown(tab), np.asarray(plain.overlay(hide=["grass"])))

    tab.click("#annotate")
    tab.wait_for_selector("#files a")
    links = [link.get_attribute("href") for link in tab.locator("#files a").all()]
    (coco,) = {link for link in links if link.endswith("scene_coco.json")}
    assert tab.request.get(coco).json() == plain.to_coco("scene.png")

    tab.locator("#overlay img").click(position={"x": 30, "y": 30})
    tab.wait_for_selector("#scores td:has-text('grass')")
    assert {url.split("/")[2] for url in tab.asked} == {page.split("/")[2]}  # nobody else is asked

    picture = np.asarray(Image.open(BytesIO(tab.screenshot())).convert("RGB"))
    assert picture.std() > 20  # a page, not a blank


def test_what_is_no_picture_is_refused(tab: Any, tmp_path: Path) -> None:
    fake, large = tmp_path / "fake.png", tmp_path / "large.png"
    fake.write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(noise).save(large)
    assert large.stat().st_size > 0.5 * 1024 * 1024
    for path, said in ((fake, "fake.png"), (large, "size")):
        tab.set_input_files("#picture input[type=file]", path)
        toast = tab.wait_for_selector(f".toast-body:has-text('{said}')")
        assert toast is not None
        assert not tab.locator("#overlay img").count()


def test_what_a_command_would_say_is_on_the_page(tab: Any, photo: Path) -> None:
    tab.click("#annotate")
    tab.wait_for_selector(".toast-body:has-text('Drop a picture first')")
    tab.set_input_files("#picture input[type=file]", photo)
    tab.wait_for_selector("#overlay img")
    address = tab.locator("#overlay img").get_attribute("src")
    tab.fill("#words textarea, #words input", "cat")
    tab.click("#go")
    tab.wait_for_selector(".toast-body:has-text('is alone')")
    wait_for_another(tab, address)


def test_a_class_is_painted(
    tab: Any, calibrated_page: str, calibrated: Talk2DINO, photo: Path, tmp_path: Path
) -> None:
    """The page shows what Python gives for the pictures and masks that it hands out."""
    model = calibrated
    tab.goto(calibrated_page)
    tab.wait_for_selector("#picture input[type=file]", state="attached")
    tab.set_input_files("#picture input[type=file]", photo)
    tab.wait_for_selector("#overlay img")
    tab.click("#by-example button")
    tab.wait_for_selector("#editor canvas")
    tab.click("#add")
    tab.wait_for_selector(".toast-body:has-text('Nothing is painted')")
    place = tab.locator("#editor canvas").first.bounding_box()
    x, y = place["x"] + 0.4 * place["width"], place["y"] + 0.5 * place["height"]
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 5, y - 60, steps=6)
    tab.mouse.move(x + 20, y + 40, steps=6)
    tab.mouse.up()
    tab.click("#add")
    tab.wait_for_selector(".toast-body:has-text('Name the class')")
    address = tab.locator("#overlay img").get_attribute("src")
    tab.fill("#name textarea, #name input", "fur")
    tab.click("#add")
    tab.wait_for_selector("#examples label:has-text('fur 1')")
    wait_for_another(tab, address)

    tab.click("#annotate")
    link = tab.wait_for_selector("#files a[href$='exemplars.zip']").get_attribute("href")
    with zipfile.ZipFile(BytesIO(tab.request.get(link).body())) as packed:
        packed.extractall(tmp_path / "exemplars")
    shown_there = read_folder(tmp_path / "exemplars")
    pixels, inside = shown_there["fur"][0].read()
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(photo)))
    assert inside[:, 112:].sum() == 0 < inside[:, 34:112].sum() == inside.sum()  # where it was
    wanted = {"cat": "cat", "grass": "grass", **shown_there}
    want = model.segment(photo, wanted, pamr=True, short_side=SHORT_SIDE)  # type: ignore[arg-type]
    np.testing.assert_array_equal(shown(tab), np.asarray(want.overlay()))
    call = "'fur': [Exemplar('exemplars/fur/1.png', 'exemplars/fur/1_mask.png')],"
    assert call in tab.inner_text("#code")

    address = tab.locator("#overlay img").get_attribute("src")
    tab.uncheck("#examples label:has-text('fur 1') input")
    wait_for_another(tab, address)
    assert "fur" not in tab.inner_text("#code")


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the editor sends: strokes over the right half, a speck, nothing; and other files."""
    folder, made = tmp_path_factory.mktemp("layers"), {}
    for name, columns in {
        "half": slice(84, None),
        "speck": slice(0, 5),
        "nothing": slice(0),
    }.items():
        layer = np.zeros((112, 168, 4), np.uint8)
        layer[: 5 if name == "speck" else None, columns] = 230, 30, 90, 255
        made[name] = folder / f"{name}.png"
        Image.fromarray(layer).save(made[name])
    made["opaque"], made["broken"] = folder / "opaque.png", folder / "broken.png"
    Image.new("RGB", (168, 112)).save(made["opaque"])
    made["broken"].write_bytes(made["half"].read_bytes()[:-30])
    made["huge"] = folder / "huge.png"
    Image.new("RGBA", (2 * SIDE + 1, 10)).save(made["huge"])
    return made


def test_examples_beside_words(model: Talk2DINO, photo: Path, layers: dict[str, Path]) -> None:
    view = add_example(model, open_picture(model, photo, SHORT_SIDE), "cat", [layers["half"]], ())
    view = add_example(model, view, "new thing", [layers["half"]], view.examples)
    view = add_example(model, view, "cat", [layers["nothing"], layers["half"]], view.examples)
    assert [one.label for one in view.examples] == ["cat 1", "new thing 1", "cat 2"]
    done = answer(model, view, Request("cat; kitten", examples=view.examples))
    mask = np.zeros((112, 168), bool)
    mask[:, 84:] = True
    one = Exemplar(photo, mask)
    classes = {"cat": ["cat", "kitten", one, one], "new thing": one}
    want = model.segment(photo, classes, pamr=True, short_side=SHORT_SIDE)
    assert done.result is not None and (done.result.labels == want.labels).all()
    compile(python_call("run", done), "call", "exec")
    assert "short_side=112" in python_call("run", done)
    without = answer(model, done, Request("cat; kitten", True, examples=view.examples[1:2]))
    assert without.result is not None and "new thing" in without.result.classes
    assert len(View(examples=view.examples).examples) == 3  # they need no picture
    held = view.picture.pixels.nbytes if view.picture else 0
    assert View(examples=view.examples).nbytes == held + 3 * mask.nbytes  # the picture once


def test_the_two_forms_of_an_accent_are_one_class(
    model: Talk2DINO, photo: Path, layers: dict[str, Path]
) -> None:
    """As macOS types it, and as others do; the class is called as its word was typed."""
    view = open_picture(model, photo, SHORT_SIDE)
    for typed, painted_as in (("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")):
        (one,) = add_example(model, view, painted_as, [layers["half"]], ()).examples
        request = Request(f"sky, {typed}; bar", examples=(one,))
        assert request.classes == {"sky": ("sky",), typed: (typed, "bar", one.exemplar)}
        done = answer(model, view, request)
        assert done.result is not None and done.result.classes == ["sky", typed]
        compile(python_call("run", done), "call", "exec")


def test_examples_are_refused(model: Talk2DINO, photo: Path, layers: dict[str, Path]) -> None:
    view = open_picture(model, photo, SHORT_SIDE)
    refused = {
        "Nothing is painted": ("fur", "nothing"),
        "cannot be read; paint again": ("fur", "broken"),
        "Name the class": ("  ", "half"),
        "none of , ; : / ": ("../fur", "half"),
        "at most 100 letters": (101 * "a", "half"),
        "control character": ("a\0", "half"),
        "smaller than a patch of 14x14 pixels": ("fur", "speck"),
    }
    for message, (name, layer) in refused.items():
        with pytest.raises(DataError, match=message):
            add_example(model, view, name, [layers[layer]], ())
    for layer in ("opaque", "huge"):
        with pytest.raises(DataError, match="cannot be read; paint again"):
            painted([layers[layer]], (112, 168))
    with pytest.raises(DataError, match="Nothing is painted"):
        painted([], (112, 168))
    one = add_example(model, view, "fur", [layers["half"]], ()).examples
    with pytest.raises(DataError, match="8 examples are in use; uncheck one"):
        add_example(model, view, "fur", [layers["half"]], one * MOST)
    with pytest.raises(ConfigError, match="name at least one"):
        _ = Request(" , ").classes


def test_the_picture_to_paint_on_is_small() -> None:
    large = to_paint_on(torch.zeros(3, 100, 3000, dtype=torch.uint8))
    assert large.size == (SIDE, 26)
    assert to_paint_on(torch.zeros(3, 30, 20, dtype=torch.uint8)).size == (20, 30)


def test_only_what_changed_is_computed(
    model: Talk2DINO, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_picture(model, photo, SHORT_SIDE)
    monkeypatch.setattr(model.vision, "forward", None)  # the encoder must not run again
    first = answer(model, view, Request("cat, grass; lawn", True, 0.5))
    monkeypatch.setattr(model, "segment", None)  # nor anything but the decision
    moved = answer(model, first, Request("cat, grass; lawn", True, 0.75))
    assert moved.result is not None and moved.result.areas()["background"] == 1.0
    call = python_call("run", moved)
    assert "{'cat': ['cat'], 'grass': ['grass', 'lawn']}, background=0.75" in call
    compile(call, "call", "exec")
    assert scores_at(moved.result, 0, 0)[0] == ["background", "0.750"]
    assert scores_at(moved.result, 500, 0) == []


def test_names_of_kept_class_embeddings(model: Talk2DINO, photo: Path, tmp_path: Path) -> None:
    """A visitor chooses among the file's names; the Python call gives the same labels."""
    made = model.embed_classes(["cat", ["grass", "lawn"], "sky"], negatives=["soil"])
    kept = ClassEmbeddings.load(made.save(tmp_path / "classes.safetensors"))
    view = open_picture(model, photo, SHORT_SIDE)
    request = Request("grass, cat", True, 0.5)
    done = answer(model, view, request, kept)
    want = model.segment(view.picture, [["grass", "lawn"], "cat"], 0.5, True, negatives=["soil"])
    assert done.result is not None and done.result.classes == want.classes
    assert (done.result.labels == want.labels).all()
    call = python_call("run", done, kept=kept).splitlines()
    assert call[0] == "from talk2dino import ClassEmbeddings, Talk2DINO"
    wanted = (
        f"ClassEmbeddings.load({str(tmp_path / 'classes.safetensors')!r}).select(['grass', 'cat'])"
    )
    assert wanted in call[3]
    for words in ("dog", "cat; kitten"):
        with pytest.raises(ConfigError, match="is not in it; its classes are cat, grass, sky"):
            answer(model, view, Request(words), kept)
    accented = model.embed_classes(["caf\u00e9", "sky"])
    assert answer(model, view, Request("cafe\u0301, sky"), accented).result
    assert accented.select(["sky", "cafe\u0301"]).words.names == ("sky", "caf\u00e9")
    with pytest.raises(ConfigError, match="give each name once"):
        accented.select(["cafe\u0301", "caf\u00e9"])


def test_annotations_to_take_away(model: Talk2DINO, photo: Path, tmp_path: Path) -> None:
    """A file per format, whatever the picture is called; several of one format are packed."""
    view = answer(model, open_picture(model, photo, SHORT_SIDE), Request("cat, grass; lawn"))
    assert view.result is not None
    made = {path.name: path for path in annotation_files(view, tmp_path, instances=True)}
    assert sorted(made) == sorted(
        f"scene_{name}"
        for name in ("coco.json", "cvat.xml", "geojson.geojson", "labelstudio.zip", "yolo.zip")
    )
    wanted = view.result.to_coco("scene.png", instances=True)
    assert json.loads(made["scene_coco.json"].read_text()) == wanted
    assert wanted["categories"][1]["synonyms"] == ["grass", "lawn"]
    with zipfile.ZipFile(made["scene_yolo.zip"]) as packed:
        assert {"data.yaml", "labels/scene.txt"} <= set(packed.namelist())
        assert packed.read("labels/scene.txt").decode() == view.result.to_yolo(instances=True)


@pytest.mark.parametrize("words", ["", " , ", "cat, cat"])
def test_words_that_name_nothing(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^classes: "):
        _ = Request(words).classes


def test_words_never_name_a_file_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("secret\n")
    assert list(Request(str(file)).classes) == [str(file)]


def test_pictures_that_are_refused(model: Talk2DINO, photo: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cut\.png is damaged"):
        open_picture(model, cut, SHORT_SIDE)
    wide = tmp_path / "wide.png"
    Image.new("1", (9000, 6000)).save(wide)
    with pytest.raises(DataError, match="9000x6000 pixels; give at most 50 million"):
        open_picture(model, wide, SHORT_SIDE)


def test_a_visitors_words_stay_words() -> None:
    need("gradio")
    from talk2dino.web.page import html_table

    assert "<b>" not in html_table("x", [["<b>cat</b>", "1 %"]])


def test_without_a_checkpoint_it_says_how_to_get_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert "make quickstart" in fails(capfd, "app")
