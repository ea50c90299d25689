"""`python -m talk2dino.segment`: a picture, a folder, a pattern; one line for what is wrong."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.config.model_and_classes import class_words
from talk2dino.datasets.pictures import picture_suffixes, to_pixels
from talk2dino.errors import ConfigError, DataError, ResultWarning
from talk2dino.inference.result_files import Job, plan, refuse_heatmap_collisions
from tests.helpers.pipeline import fails, need, run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("b.jpg", (64, 48)), ("c.PNG", (30, 30))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def options(trained_run: Path, tmp_path: Path) -> list[str]:
    return [
        f"checkpoint={trained_run}",
        "classes=[cat,grass,brick wall]",
        "short_side=56",
        "accelerator=cpu",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]


def test_one_picture(
    trained_run: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("talk2dino.segmentation.memory.LARGE", 1000)
    out = tmp_path / "new" / "a.png"
    given = [*options(trained_run, tmp_path), f"image={pictures / 'a.png'}", f"output={out}"]
    run("segment", *given, "heatmaps=true", "negatives=[sky]", "refinement=knn", "refinement.k=5")
    labels = np.asarray(Image.open(out.with_name("a_labels.png")))
    assert labels.shape == (50, 70)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert Image.open(out).width >= 70
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["size"] == [50, 70]
    names = ["background", "cat", "grass", "brick wall"]
    assert [entry["name"] for entry in figures["classes"]] == names
    assert [entry["pixels"] for entry in figures["classes"]] == [
        int((labels == index).sum()) for index in range(4)
    ]
    assert figures["settings"]["refinement"]["k"] == 5
    assert figures["heatmaps"]["brick wall"] == "a_heat_brick-wall.png"
    assert set(figures["heatmaps"]) == set(names[1:])
    assert Image.open(out.with_name("a_heat_cat.png")).size == (70, 50)
    printed = capsys.readouterr().out
    for name in ("cat", "grass", "brick wall", "██", str(out)):
        assert name in printed.replace("\n", "")
    assert re.match(r"a\.png: takes about \d\.\d GB of working memory", printed)


def test_a_folder_with_a_broken_picture(
    trained_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are done, it is named at the end, and a second call leaves out what is done."""
    (pictures / "broken.png").write_bytes(b"\x89PNG nothing more")
    out = tmp_path / "out"
    given = [*options(trained_run, tmp_path), f"image={pictures}", f"output={out}", "pamr=false"]
    with pytest.raises(SystemExit) as stopped:
        run("segment", *given, "background=0.5")
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "1 of 4 pictures could not be read" in said.err
    assert "broken.png" in said.err
    assert "mean share" in said.out
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{s}{e}" for s in "abc" for e in (".json", ".png", "_labels.png")]
    assert Image.open(out / "b_labels.png").size == (48, 64)
    assert np.asarray(Image.open(out / "b_labels.png")).max() <= 3
    (pictures / "broken.png").unlink()
    (out / "a.json").unlink()
    before = (out / "b.json").stat().st_mtime_ns
    run("segment", *given, "background=0.5", "resume=true")
    assert "2 of 3 pictures were done before" in capsys.readouterr().out
    assert (out / "a.json").is_file()
    assert (out / "b.json").stat().st_mtime_ns == before
    assert Job(pictures / "b.jpg", out / "b.png", out, "b.jpg").lacks({"background": 0.6})


def test_pictures_that_a_folder_leaves_out_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talk2dino.datasets.pictures.picture_suffixes", lambda: {".png"})
    photos = tmp_path / "photos"
    for name in ("a.png", "b.HEIC", "trip/c.png", "trip/day/d.png", "out/a.png", "notes.txt"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"")
    with pytest.warns(ResultWarning) as told:
        jobs = plan(str(photos), photos / "out")
    assert [job.image.name for job in jobs] == ["a.png"]
    assert [str(one.message) for one in told] == [
        f"image={photos}: 1 pictures are left out; .heic needs: pip install 'talk2dino[heic]'",
        f"image={photos}: 2 pictures in its subfolders are left out; subfolders=true takes them",
    ]
    there = plan(f"{photos}/trip/**/*", tmp_path / "elsewhere")
    assert [job.image.name for job in there] == ["c.png", "d.png"]


def test_errors_are_one_line(
    trained_run: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = options(trained_run, tmp_path)
    one = f"image={pictures / 'a.png'}"
    cases = {
        "image=nowhere.png: no such file or folder": [*given, "image=nowhere.png"],
        "so output must be a folder": [
            *given,
            f"image={pictures}",
            f"output={tmp_path / 'x.png'}",
        ],
        "classes: the list is empty": [*given, one, "classes=[]"],
        "cannot be read as an image": [*given, f"image={pictures / 'notes.txt'}"],
        "accelerator='tpu'; choose auto, ": [*given, one, "accelerator=tpu"],
        "accelerator=mps: there is none here": [*given, one, "accelerator=mps"],
        "checkpoint=none.pth: no such file": [*given, one, "checkpoint=none.pth"],
        "would overwrite the image": [*given, one, f"output={pictures / 'a.png'}"],
        "a.png would overwrite": [*given, f"image={pictures / '*'}", f"output={pictures}"],
        "background=7": [*given, one, "background=7"],
    }
    for message, arguments in cases.items():
        if not any(item.startswith("output=") for item in arguments):
            arguments = [*arguments, f"output={tmp_path / 'out.png'}"]
        assert message in fails(capfd, "segment", *arguments)


def test_wrong_words_are_told_before_the_model_is_loaded(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["checkpoint=none.pth", f"image={pictures}", f"output={tmp_path / 'out'}"]
    given += [f"hydra.run.dir={tmp_path / 'run'}", "classes=[background,cat]"]
    for said, more in {
        "'background' is also what is left over": ["background=true"],
        "'background' is also what is left over; ": ["negatives=[dog]"],
        "negatives: 'cat' is also a word of the class 'cat'": ["negatives=[cat]"],
        "negatives: '' is neither a word": ["negatives=['']"],
        "negatives: 'a\\tb' has a control character": ["negatives=['a\tb']"],
        "templates='nonesuch' is unknown": ["templates=nonesuch"],
        "templates='' is unknown": ["templates=''"],
        "background=7": ["background=7"],
        "formats=[coco,coco]: coco is there twice": ["formats=[coco,coco]"],
        "none.pth: no such file": ["negatives=[dog]", "classes=[cat]", "templates=photo"],
    }.items():
        assert said in fails(capfd, "segment", *given, *more)


def test_other_commands_tell_wrong_words_as_early(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need("rasterio", "av", "onnx", "onnxscript", "onnxruntime")
    given = ["checkpoint=none.pth", f"hydra.run.dir={tmp_path / 'run'}", "classes=[cat]"]
    shut = "negatives: 'cat' is also a word of the class 'cat'"
    for name, more, said in (
        ("map", [f"image={tmp_path}/x.tif", "negatives=[cat]"], shut),
        ("video", [f"video={tmp_path}/x.mp4", "negatives=[cat]"], shut),
        ("embed", [f"output={tmp_path}/x.safetensors", "negatives=[cat]"], shut),
        ("export", [f"output={tmp_path}/x", "templates=nonesuch"], "templates='nonesuch' is"),
    ):
        assert said in fails(capfd, name, *given, *more)


def test_without_a_checkpoint_it_says_how_to_get_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = fails(capfd, "segment", f"hydra.run.dir={tmp_path}")
    assert said.startswith("checkpoint=…, image=…, classes=… not given")
    assert "make quickstart" in said and "Hub id" in said
    said = fails(capfd, "segment", f"hydra.run.dir={tmp_path}", "checkpoint=x", "image=y")
    assert said == "classes=… not given; for instance classes='[cat,sofa]'"


def test_plan(pictures: Path, tmp_path: Path) -> None:
    one = pictures / "b.jpg"
    assert plan(str(one), tmp_path / "x.png") == [Job(one, tmp_path / "x.png", tmp_path, "b.jpg")]
    with pytest.raises(ConfigError, match=r"x\.jpg: overlays are PNG; use output=.*x\.png"):
        plan(str(one), tmp_path / "x.jpg")
    (tmp_path / "there").mkdir()
    there = tmp_path / "there"
    assert plan(str(one), there) == [Job(one, there / "b.png", there, "b.jpg")]
    names = [job.image.name for job in plan(str(pictures), tmp_path / "out")]
    assert names == ["a.png", "b.jpg", "c.PNG"]
    names = [job.image.name for job in plan(str(pictures / "[ab].*"), tmp_path / "out")]
    assert names == ["a.png", "b.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in this folder"):
        plan(str(tmp_path / "empty"), tmp_path / "out")
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "empty" / "deeper").mkdir()
    (tmp_path / "empty" / "deeper" / "a.png").write_bytes(one.read_bytes())
    with pytest.raises(DataError, match=r"folder; 1 pictures in its sub.*subfolders=true takes"):
        plan(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(DataError, match="no picture fits it as pattern"):
        plan(str(pictures / "*.webp"), tmp_path / "out")
    Image.new("RGB", (4, 4)).save(pictures / "b.png")
    with pytest.raises(DataError, match=r"b\.jpg and b\.png would both become b\.png"):
        plan(str(pictures), tmp_path / "out")
    (pictures / "b.png").rename(pictures / "a_labels.png")
    with pytest.raises(DataError, match=r"would both become a_labels\.png"):
        plan(str(pictures), tmp_path / "out")


def test_results_below_a_pattern_are_no_pictures(
    trained_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*options(trained_run, tmp_path), f"image={pictures}/**/*", "pamr=false"]
    given += [f"output={pictures / 'seg'}", "resume=true"]
    run("segment", *given)
    capsys.readouterr()
    run("segment", *given)
    assert "3 of 3 pictures were done before" in capsys.readouterr().out


def test_the_folder_one_is_in_is_an_output(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = plan(str(pictures / "b.jpg"), Path())
    assert [(job.image, job.overlay) for job in jobs] == [(pictures / "b.jpg", Path("b.png"))]


def test_heat_maps_take_no_name_of_another_picture(tmp_path: Path) -> None:
    for name in ("cat.jpg", "cat_heat_dog.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    jobs = plan(str(tmp_path), tmp_path / "out")
    refuse_heatmap_collisions(jobs, ["sofa"], "photos")
    with pytest.raises(DataError, match=r"heat map of cat\.jpg and belongs to cat_heat_dog\.jpg"):
        refuse_heatmap_collisions(jobs, ["sofa", "dog"], "photos")


def test_heat_maps_have_names_of_their_own(tmp_path: Path) -> None:
    job = Job(tmp_path / "a.jpg", tmp_path / "a.png", tmp_path, "a.jpg")
    maps = job.heatmaps(["dark cat", "dark/cat", "sofa"])
    assert [path.name for path in maps.values()] == [
        "a_heat_dark-cat-0.png",
        "a_heat_dark-cat-1.png",
        "a_heat_sofa.png",
    ]


def test_hostile_names_of_heat_maps(tmp_path: Path) -> None:
    names = ["a b", "a/b", "a-b-0", "A-B", "x" * 300, "ß" * 300, "…", "?"]
    maps = Job(tmp_path / "p.jpg", tmp_path / "p.png", tmp_path, "p.jpg").heatmaps(names)
    files = [path.name.casefold() for path in maps.values()]
    assert len(set(files)) == len(names)
    for path in maps.values():
        path.write_bytes(b"")  # the file system takes it


def test_an_output_keeps_its_dots(pictures: Path, tmp_path: Path) -> None:
    one = pictures / "b.jpg"
    for name in ("results.v1", "results.v2", "2024_05_06"):
        assert [job.overlay for job in plan(str(one), tmp_path / name)] == [
            tmp_path / f"{name}.png"
        ]
    jobs = plan(str(pictures), tmp_path / "run.v3")
    assert {job.overlay.parent for job in jobs} == {tmp_path / "run.v3"}
    assert jobs[0].labels.name == "a_labels.png"
    (tmp_path / "made.jpg").mkdir()
    assert plan(str(pictures), tmp_path / "made.jpg")[0].overlay.parent == tmp_path / "made.jpg"


def test_patterns_say_why_they_fit_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trip = tmp_path / "trip [2020]"
    pictures.rename(trip)
    assert [job.image.name for job in plan(f"{trip}/*.jpg", tmp_path / "out")] == ["b.jpg"]
    with pytest.raises(DataError, match=r"no pictures that can be read \(found \.txt; pictures"):
        plan(f"{trip}/*.txt", tmp_path / "out")
    (trip / "x.HEIC").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    picture_suffixes.cache_clear()
    with pytest.raises(DataError, match=r"\.heic needs: pip install 'talk2dino\[heic\]'"):
        plan(f"{trip}/*.HEIC", tmp_path / "out")
    with pytest.raises(DataError, match=r"x\.HEIC: .*pip install 'talk2dino\[heic\]'"):
        to_pixels(trip / "x.HEIC")
    monkeypatch.undo()
    picture_suffixes.cache_clear()


def test_photographs_of_telephones(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    color = Image.new("RGB", (64, 48), (200, 30, 90))
    heif.from_pillow(color).save(tmp_path / "photo.HEIC", quality=90)
    names = ["photo.HEIC"]
    if ".avif" in Image.registered_extensions():  # of Pillow from 11.3 on
        names.append("photo.avif")
        color.save(tmp_path / names[-1])
    for name in names:
        pixels = to_pixels(tmp_path / name)
        assert pixels.shape == (3, 48, 64)
        assert (pixels.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() < 6


def test_nothing_of_the_user_is_overwritten(
    trained_run: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What this command wrote is, known by what it says of itself and not by its name."""
    out = tmp_path / "lm"
    out.mkdir()
    given = [*options(trained_run, tmp_path), f"image={pictures / 'a.png'}", f"output={out}"]
    given.append("pamr=false")
    for name, content in (
        ("a.json", b'{"annotations": []}'),
        ("a.png", (pictures / "c.PNG").read_bytes()),
        ("a_labels.png", b"not even a picture"),
        ("a_heat_cat.png", b""),
    ):
        (out / name).write_bytes(content)
        said = fails(capfd, "segment", *given, "heatmaps=true")
        assert f"{name} is there and was not written by talk2dino.segment" in said
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_bytes() == content
        (out / name).unlink()
    run("segment", *given)
    run("segment", *given)  # its own files
    for name in ("a.png", "a_labels.png"):  # as an earlier version wrote them, without a mark
        with Image.open(out / name) as picture:
            picture.load()
            picture.info.pop("Software", None)
            picture.save(out / name)
    run("segment", *given)
    (out / "a.json").write_text("{}")
    fails(capfd, "segment", *given)
    run("segment", *given, "overwrite=true")
    assert "written_by" in json.loads((out / "a.json").read_text())


def test_resuming_notices_other_weights_and_missing_files(
    trained_run: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    checkpoint = tmp_path / "psi.safetensors"
    checkpoint.write_bytes((trained_run / "projection.safetensors").read_bytes())
    given = [*options(trained_run, tmp_path), f"image={pictures / 'a.png'}", "pamr=false"]
    given += [f"output={tmp_path / 'out.png'}", f"checkpoint={checkpoint}", "resume=true"]

    def was_done(*more: str) -> bool:
        capsys.readouterr()
        run("segment", *given, *more)
        return "1 of 1 pictures were done before" in capsys.readouterr().out

    assert not was_done()
    assert was_done()
    assert not was_done("heatmaps=true")  # the maps are missing
    assert was_done("heatmaps=true")
    (tmp_path / "out_heat_cat.png").unlink()
    assert not was_done("heatmaps=true")
    assert not was_done("short_side=64")
    assert not was_done("short_side=64", "heatmaps=true")  # those that lie there are of before
    assert was_done("short_side=64", "heatmaps=true")
    with monkeypatch.context() as patched:  # killed after the pictures: nothing says it is done
        patched.setattr("talk2dino.inference.result_files.figures", broken)
        with pytest.raises(KeyboardInterrupt):
            was_done("short_side=32")
    assert not was_done("short_side=64")
    (tmp_path / "out_labels.png").unlink()
    assert not was_done()
    names = tmp_path / "names.txt"
    for content in ("cat\ngrass", "cat\nbrick wall", "brick wall\ncat"):
        names.write_text(content)
        assert not was_done(f"classes={names}")
        assert was_done(f"classes={names}")
    assert not was_done()
    other = tmp_path / "other" / "a.png"
    other.parent.mkdir()
    Image.open(pictures / "a.png").rotate(180).save(other)
    assert not was_done(f"image={other}")
    assert was_done(f"image={other}")
    found = read_checkpoint(checkpoint)
    with torch.no_grad():
        next(iter(found.projection.parameters())).add_(1)
    save_projection(found.projection, checkpoint, {"vision": found.vision, "text": found.text})
    assert not was_done()


def test_class_words(tmp_path: Path) -> None:
    want = {"cat": ("cat",), "sofa": ("sofa", "couch")}
    assert class_words("cat, sofa; couch ,") == want
    assert class_words(OmegaConf.create(["cat", "sofa; couch"])) == want
    assert class_words(OmegaConf.create(["cat", ["sofa", "couch"]])) == want
    assert class_words("{cat: cat, sofa: [sofa, couch]}") == want
    assert class_words(OmegaConf.create({"cat": "cat", "sofa": ["sofa", "couch"]})) == want
    both = {"background": ("background",), "cat": ("cat",)}  # a word, wherever it stands
    assert class_words("[background,cat]") == both == class_words("[cat,background]")
    assert class_words(OmegaConf.create(["cat", "background"])) == both
    with pytest.raises(ConfigError, match="'cat' is named twice"):
        class_words("cat, dog, cat")
    (tmp_path / "words.txt").write_text("cat\nsofa; couch\n")
    assert class_words(str(tmp_path / "words.txt")) == want
    assert len(class_words("voc")) == 20  # comes with the package
    with pytest.warns(ResultWarning, match=r"background\+voc: its background is left out, for it"):
        assert len(class_words("background+voc", False)) == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        assert len(class_words("background+voc", 0.0)) == 20  # a score, where it may be
    (tmp_path / "words.csv").write_text("cat\n")
    for given in (f"{tmp_path}/words.csv", [f"{tmp_path}/words.txt"], f"cat,{tmp_path}/words.csv"):
        with pytest.raises(ConfigError, match="is a file; a list is a"):
            class_words(given)
    with pytest.raises(ConfigError, match="list is empty"):
        class_words(" , ")
    with pytest.raises(DataError, match=r"^classes=nowhere\.txt: no such file"):
        class_words("nowhere.txt")


def test_subfolders_are_taken_when_asked_for_and_what_is_done_again_is_said(
    tmp_path: Path, trained_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("a.png", "deep/a.png", ".thumbnails/b.png"):  # what is hidden is not taken
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (90, 140, 60)).save(photos / name)
    given = [f"checkpoint={trained_run}", f"image={photos}", f"output={out}", "classes=[cat,sea]"]
    given += ["subfolders=true", "pamr=false", "short_side=112", "accelerator=cpu", "resume=true"]
    given += ["formats=[labelstudio]", "background=0.99"]
    with pytest.warns(ResultWarning, match="nearly all is background.* at 0.99") as told:
        run("segment", *given)
    assert not any("left out" in str(one.message) for one in told)
    said = capfd.readouterr()
    assert (out / "deep" / "a_labels.png").is_file() and (out / "a_labels.png").is_file()
    assert "…_labels.png" in said.out and not (out / ".thumbnails").exists()
    assert "Label Studio fetches pictures from /data/local-files/?d=NAME" in said.out
    run("segment", *given, "minimum_area=5")
    said = capfd.readouterr()
    assert "2 pictures are done again" in said.out and "minimum_area=1, now 5" in said.out
    run("segment", *given, "minimum_area=5", "background=0.98")
    assert "background=0.99, now 0.98" in capfd.readouterr().out
    run("segment", *given, "minimum_area=5", "background=0.98")
    assert "2 of 2 pictures were done before" in capfd.readouterr().out
