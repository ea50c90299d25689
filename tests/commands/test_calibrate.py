"""`python -m talk2dino.calibrate`, and every command that finds what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.calibration.calibration import Calibration
from talk2dino.datasets.mosaic import MosaicBenchmark
from talk2dino.datasets.pictures import to_picture
from tests.helpers.evaluations import evaluate_mosaic
from tests.helpers.pipeline import fails, run

FILE = "calibration.safetensors"


@pytest.fixture(scope="module")
def calibrated(
    trained_run: Path, mosaic_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of the trained projection, calibrated with the store of its training."""
    folder = tmp_path_factory.mktemp("calibrated")
    weights = (trained_run / "projection.safetensors").read_bytes()
    (folder / "projection.safetensors").write_bytes(weights)
    run("calibrate", f"checkpoint={folder}", f"store={mosaic_store}", "tokens=500")
    return folder


def test_all_give_the_same_labels(
    calibrated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Evaluation, segmentation and Python; and without the calibration, those of before."""
    made = Calibration.load(calibrated / FILE)
    assert made.tokens.shape == (500, 1152) and made.facts["pictures"] == 24
    assert made.background is not None and 0.3 < made.background.threshold < 0.8
    assert made.describe()["rule"] == "UnmentionedOffset" and made.describe()["captions"]
    bench = MosaicBenchmark(name="scenes", count=1, height=112, width=112)
    sample, names = bench.sample(0), [c.name for c in bench.class_list.prompted]
    to_picture(sample.image).save(tmp_path / "scene.png")
    maps = {}
    for setting in ("auto", "none"):
        evaluation = [
            *evaluate_mosaic(calibrated, tmp_path / setting, "benchmark.count=1"),
            *("label_maps=true", "benchmark.short_side=112", f"calibration={setting}"),
        ]
        run(*evaluation)
        results = json.loads((tmp_path / setting / "results.json").read_text())
        if setting == "auto":
            assert results["calibration"]["sha256"] == made.digest
            assert results["config"]["calibration"] == str(calibrated / FILE)
            assert results["config"]["refinement"]["k"] == 32
        else:
            assert "calibration" not in results and results["config"]["calibration"] is None
            assert results["config"]["refinement"] is None
        segmentation = [
            *("segment", f"checkpoint={calibrated}", f"image={tmp_path / 'scene.png'}"),
            *(f"output={tmp_path / f'{setting}.png'}", f"classes=[{','.join(names)}]"),
            *("short_side=112", "pamr=false", "resume=true", "overwrite=true"),
            f"calibration={setting}",
        ]
        run(*segmentation)
        settings = json.loads((tmp_path / f"{setting}.json").read_text())["settings"]
        assert settings.get("calibration") == (made.digest if setting == "auto" else None)
        assert ("refinement" in settings) == (setting == "auto")
        capfd.readouterr()
        run(*segmentation)
        assert "1 of 1 pictures were done before" in capfd.readouterr().out
        model = Talk2DINO.from_pretrained(calibrated, "cpu", calibration=setting)
        seg = model.segment(sample.image, names, short_side=112)
        shown = np.asarray(Image.open(tmp_path / f"{setting}_labels.png"))
        np.testing.assert_array_equal(shown, seg.labels.numpy())
        [evaluated] = (tmp_path / setting / "label_maps").glob("scene-00000.png")
        np.testing.assert_array_equal(np.asarray(Image.open(evaluated)), seg.labels.numpy())
        maps[setting] = seg.labels
    assert not (maps["auto"] == maps["none"]).all()
    again = evaluate_mosaic(calibrated, tmp_path / "auto", "calibration=none", "benchmark.count=1")
    assert "began with calibration=" in fails(capfd, *again)
    (tmp_path / "none.json").write_text((tmp_path / "auto.json").read_text())
    run(*segmentation)  # what was made with a calibration is not what is asked for
    assert "were done before" not in capfd.readouterr().out


def test_pictures_make_a_reference_too(
    calibrated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        sample = MosaicBenchmark(name="scenes", count=3, height=84, width=84).sample(number)
        to_picture(sample.image).save(folder / f"{number}.png")
    out = tmp_path / "other.safetensors"
    given = [f"checkpoint={calibrated}", f"images={folder}", f"output={out}", "tokens=100"]
    run("calibrate", *given, "short_side=84", "rule.share=1", "accelerator=cpu")
    assert "photos: no captions, so what a word scores on all" in capfd.readouterr().out
    made = Calibration.load(out)
    assert made.unmentioned is None
    assert len(made.tokens) == 100 and made.facts["pictures"] == 3
    assert made.describe()["share"] == 1


def test_a_few_labels_give_every_class_an_offset(
    calibrated: Path, mosaic_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Labels of ten scenes: a cross-fitted estimate, offsets in the file, and in every score."""
    bench = MosaicBenchmark(name="scenes", count=10, height=112, width=112)
    for number in range(10):
        sample = bench.sample(number)
        for folder, picture in (
            ("images", to_picture(sample.image)),
            ("masks", Image.fromarray(sample.target.numpy().astype(np.uint8))),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{number}.png")
    names = [*bench.class_list.names, "submarine"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    out = tmp_path / "labeled.safetensors"
    given = [f"checkpoint={calibrated}", f"store={mosaic_store}", "tokens=500", "short_side=112"]
    given += ["rule=mean", "rule.share=0"]  # so that labels have something to mend
    labels = [f"{key}={tmp_path / key}" for key in ("images", "masks")]
    labels.append(f"classes={tmp_path / 'classes.txt'}")
    capfd.readouterr()
    run("calibrate", *given, *labels, f"output={out}")
    said = capfd.readouterr().out
    assert "labeled patches of 10 pictures" in said and "(5 folds)" in said
    made = Calibration.load(out)
    assert len(made.tokens) == 500
    if "bring nothing" in said:
        pytest.fail(f"the labels of the scenes bring nothing: {said}")
    shown = {names[k] for n in range(10) for k in bench.sample(n).target.unique().tolist()}
    assert set(made.class_offsets) == shown and "submarine" in said
    assert made.describe()["class_offsets"] == len(shown)
    assert made.facts["mean_iou_cross_fitted"] > made.facts["mean_iou_without"]
    plain = Talk2DINO.from_pretrained(calibrated, "cpu", calibration="none")
    model = Talk2DINO.from_pretrained(calibrated, "cpu", calibration=out)
    picture, first = bench.sample(0).image, sorted(shown)[0]
    before, after = (
        one.segment(picture, names, short_side=112, refinement=None).scores[names.index(first)]
        for one in (plain, model)
    )
    before, after = before.logit(), after.logit()
    np.testing.assert_allclose(before - after, made.class_offsets[first], atol=2e-3)


def test_what_cannot_be_done_is_one_line(
    calibrated: Path, mosaic_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, store = f"checkpoint={calibrated}", f"store={mosaic_store}"
    refused = {
        "checkpoint=… not given": ["tokens=100", store],
        "give one of store=DIR": [checkpoint],
        "give one of store=DIR, a feature": [checkpoint, store, f"images={tmp_path}"],
        "no pictures in this folder": [checkpoint, f"images={tmp_path}"],
        "rule=KNN: a file can name": [
            *(checkpoint, store, "~rule", "+rule._target_=talk2dino.segmentation.KNN"),
        ],
        "masks=… not given: labels are": [checkpoint, store, f"images={tmp_path}", "classes=[a,b]"],
        "images=… not given: labels are": [checkpoint, store, "masks=x", "classes=[a,b]"],
        "classes=… not given: labels are": [checkpoint, f"images={tmp_path}", "masks=x"],
        "masks=x: no such folder": [checkpoint, f"images={tmp_path}", "masks=x", "classes=[a,b]"],
        "tokens=99999: use 100 to 65536": [checkpoint, store, "tokens=99999"],
        "templates='nonesuch' is unknown": [
            *("checkpoint=none", f"output={tmp_path / 'c.safetensors'}", store),
            "templates=nonesuch",
        ],
        "not written by talk2dino.calibrate": [
            *(checkpoint, store, f"output={calibrated / 'projection.safetensors'}"),
        ],
    }
    for message, given in refused.items():
        assert message in fails(capfd, "calibrate", *given)
