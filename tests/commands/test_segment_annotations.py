"""`python -m talk2dino.segment formats=[…]`: one data set per format, resumed, never replacing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.annotations.data_sets import FORMATS
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from talk2dino.inference.process_shares import annotations_folder
from talk2dino.inference.result_files import Job
from tests.helpers.encoders import SMALL_CLIP
from tests.helpers.pipeline import fails, files_below, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
ALL = f"formats=[{','.join(FORMATS)}]"


@pytest.fixture(scope="module")
def psi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose encoders are small and have random weights; class embeddings beside it."""
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random", templates="plain")
    model = Talk2DINO(vision, text, ProjectionLayer(text.embed_dim, vision.embed_dim))
    folder = tmp_path_factory.mktemp("psi")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(model.projection, folder / "psi.safetensors", specs)
    model.embed_classes(["cat", ["sofa", "couch"], "grass"]).save(folder / "classes.safetensors")
    return folder


@pytest.fixture
def given(psi: Path, tmp_path: Path) -> list[str]:
    """A command line for a folder of three pictures."""
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("b.jpg", (64, 48)), ("c.png", (30, 30))):
        pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return [
        *(f"checkpoint={psi / 'psi.safetensors'}", f"classes={psi / 'classes.safetensors'}"),
        *(f"image={tmp_path / 'photos'}", f"output={tmp_path / 'out'}"),
        *("short_side=32", "pamr=false", "accelerator=cpu"),
        f"hydra.run.dir={tmp_path / 'run'}",
    ]


def coco(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "annotations" / "coco" / "instances.json").read_text()))


def test_a_folder_is_one_data_set(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken pictures are left out; a second run takes up what is done and gives the same files."""
    broken, out = tmp_path / "photos" / "b2.png", tmp_path / "out"
    broken.write_bytes(b"\x89PNG nothing more")
    with pytest.raises(SystemExit) as stopped:
        run("segment", *given, ALL)
    assert stopped.value.code == 1
    assert "1 of 4 pictures could not be read" in capsys.readouterr().err
    assert {path.name for path in (out / "annotations").iterdir()} == set(FORMATS)
    read = COCO(str(out / "annotations" / "coco" / "instances.json"))
    assert [one["file_name"] for one in read.imgs.values()] == ["a.png", "b.jpg", "c.png"]
    assert read.cats[2]["synonyms"] == ["sofa", "couch"]
    for image in read.imgs.values():
        labels = np.asarray(Image.open(out / f"{Path(image['file_name']).stem}_labels.png"))
        masks = {one["category_id"]: read.annToMask(one) for one in read.imgToAnns[image["id"]]}
        assert masks.keys() == set(np.unique(labels) + 1)
        for number, mask in masks.items():
            np.testing.assert_array_equal(mask == 1, labels == number - 1)
    linked = out / "annotations" / "yolo" / "images" / "b.jpg"
    assert linked.resolve() == (tmp_path / "photos" / "b.jpg").resolve()
    before = files_below(out / "annotations")
    broken.unlink()
    (out / "b.json").unlink()
    run("segment", *given, ALL, "resume=true")
    assert "2 of 3 pictures were done before" in capsys.readouterr().out
    assert files_below(out / "annotations") == before


def test_more_formats_need_no_model(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pictures that were done without masks are done again, and then only for other masks."""
    run("segment", *given)
    again = [*given, "resume=true", "instances=true"]
    run("segment", *again, "formats=[coco]")
    assert "done before" not in capsys.readouterr().out
    whole = coco(tmp_path / "out")
    assert len(whole["images"]) == 3
    monkeypatch.setattr("talk2dino.config.model_and_classes.load_model", None)
    run("segment", *again, "formats=[coco,geojson]", "polygons=true", "tolerance=0")
    assert "3 of 3 pictures were done before" in capsys.readouterr().out
    as_polygons = coco(tmp_path / "out")
    assert [one["area"] for one in as_polygons["annotations"]] == [
        one["area"] for one in whole["annotations"]
    ]
    for other in ("instances=false", "minimum_area=9"):
        with pytest.raises(TypeError, match="NoneType"):
            run("segment", *again, "formats=[coco]", other)
    assert coco(tmp_path / "out") == as_polygons


def test_a_data_set_below_the_pattern_holds_no_pictures(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YOLO's links lead to the photographs, which are not to be taken twice."""
    photos = tmp_path / "photos"
    given = [*given, f"image={photos}/**/*", f"output={photos / 'seg'}", "formats=[yolo]"]
    run("segment", *given)
    run("segment", *given, "resume=true")
    assert "3 of 3 pictures were done before" in capsys.readouterr().out
    assert len(list((photos / "seg" / "annotations" / "yolo" / "images").iterdir())) == 3


def test_where_they_go(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    jobs = [Job(tmp_path / "a.png", tmp_path / "out" / "x.png", tmp_path / "out", "a.png")]
    one = annotations_folder(jobs, str(tmp_path / "a.png"))
    assert one == tmp_path / "out" / "x_annotations"
    assert annotations_folder(jobs, str(tmp_path)) == tmp_path / "out" / "annotations"


def test_errors_are_one_line(
    given: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "out" / "annotations" / "coco" / "instances.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("{}")
    said = fails(capfd, "segment", *given, "formats=[coco]")
    assert said.startswith(f"{foreign.parent}: is there and holds other files")
    assert foreign.read_text() == "{}"
    given = [*given, "checkpoint=none.pth"]  # found out later than all of these
    for more in ("negatives=[dog]", "templates=photo"):
        assert "holds embeddings, so" in fails(capfd, "segment", *given, more)
    for value, said in {
        "formats=[coca]": "formats=[coca]: no such format; choose among coco, yolo, labelstudio",
        "tolerance=-1": "tolerance=-1.0: use 0 to",
        "tolerance=nan": "tolerance=nan: use 0 to",
        "tolerance=far": "tolerance=far",
        "minimum_area=-1": "minimum_area=-1: use 0 to",
    }.items():
        assert said in fails(capfd, "segment", *given, "formats=[coco]", value), value
    for value, formats, more in (
        ("instances=true", "", "coco"),
        ("minimum_area=9", "", "coco"),
        ("polygons=true", "", "coco"),
        ("polygons=true", "yolo", "yolo,coco"),
        ("tolerance=0.5", "", "geojson"),
        ("image_root_url=https://x/", "coco,yolo", "coco,yolo,labelstudio"),
    ):
        key = value.partition("=")[0]
        line = fails(capfd, "segment", *given, value, f"formats=[{formats}]")
        advice = f"add formats='[{more}]' or leave {key} out"
        assert f"{value}: does nothing with formats=[{formats}]; {advice}" in line
        assert "none.pth" in fails(capfd, "segment", *given, value, f"formats=[{more}]")
    line = fails(capfd, "segment", *given, "tolerance=0.5", "formats=[coco,cvat]")
    assert "formats=[coco,cvat]; add polygons=true or leave tolerance out" in line
    both = ("polygons=true", "tolerance=0.5", "formats=coco")
    assert "none.pth" in fails(capfd, "segment", *given, *both)


def test_a_list_needs_no_brackets(given: list[str], tmp_path: Path) -> None:
    run("segment", *given, "formats=coco,geojson")
    made = {path.name for path in (tmp_path / "out" / "annotations").iterdir()}
    assert made == {"coco", "geojson"}


def test_what_is_in_the_way_is_said_before_the_model_is_loaded(
    given: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data_sets = tmp_path / "out" / "annotations"
    data_sets.parent.mkdir()
    given = [*given, "checkpoint=none.pth", "formats=[coco]", "overwrite=true"]
    data_sets.touch()
    assert fails(capfd, "segment", *given).startswith(f"{data_sets}: is no folder")
    data_sets.unlink()
    data_sets.mkdir()
    (data_sets / "coco").symlink_to("nowhere")
    assert fails(capfd, "segment", *given).startswith(f"{data_sets / 'coco'}: is no folder")
    (data_sets / "coco").unlink()
    (tmp_path / "photos").rename(tmp_path / "annotations")
    below = [f"image={tmp_path}/annot*/*", "subfolders=true"]
    said = fails(capfd, "segment", *given, *below)
    assert "the results of annotations/a.png would lie among the data sets" in said
    for more in (["formats=[]"], ["subfolders=false"]):
        assert "none.pth" in fails(capfd, "segment", *given, *below, *more)


def test_damaged_figures_are_told_in_one_line(
    given: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*given, "formats=[coco]", "resume=true"]
    run("segment", *given)
    for name in ("a", "b"):
        file = tmp_path / "out" / f"{name}.json"
        whole = json.loads(file.read_text())
        noted = whole["annotations"]
        mask = noted["masks"][0]
        for broken in (
            {"annotations": {**noted, "masks": None}},
            {"annotations": {key: noted[key] for key in noted if key != "masks"}},
            {"annotations": {**noted, "masks": [{**mask, "class": 3}]}},
            {"annotations": {**noted, "masks": [{**mask, "class": -1}]}},
            {"size": [1]},
            *([{"classes": whole["classes"][1:]}, {"classes": 3}] if name == "a" else []),
        ):
            file.write_text(json.dumps({**whole, **broken}))
            said = fails(capfd, "segment", *given)
            assert said.startswith(f"{file}: damaged (") and said.endswith("use resume=true")
        file.write_text(json.dumps(whole))
    run("segment", *given)
