"""`python -m talk2dino.map` from its command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino import Exemplar, Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from talk2dino.segmentation import KNN
from tests.helpers.pipeline import fails, run
from tests.helpers.stores import CLIP

rasterio = pytest.importorskip("rasterio")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint with random encoders and a picture of 32 by 32 pixels."""
    folder = tmp_path_factory.mktemp("map")
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder(CLIP, weights="random", templates="plain")
    torch.manual_seed(1)  # with this ψ the class that is shown gets pixels
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(
        ProjectionLayer(text.embed_dim, vision.embed_dim), folder / "psi.safetensors", specs
    )
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "map.png")
    return [
        *(f"checkpoint={folder / 'psi.safetensors'}", f"image={folder / 'map.png'}", "window=32"),
        *("classes=[cat,sofa,tree]", "pamr=false", "accelerator=cpu"),
    ]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_labels_areas_and_polygons(
    given: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "labels.tif"
    run("map", *given, f"output={target}", "polygons=true", "minimum_area=2")
    said = capfd.readouterr().out
    assert "label map: " in said and "polygons: " in said and "tree" in said
    checkpoint, picture = (one.partition("=")[2] for one in given[:2])
    model = Talk2DINO.from_pretrained(checkpoint, device="cpu")
    wanted = model.segment(picture, ["cat", "sofa", "tree"], short_side=32).labels
    with rasterio.open(target) as file:
        assert np.array_equal(file.read(1), wanted.numpy())
    first = target.read_bytes()
    run("map", *given, f"output={target}")  # over its own
    assert target.read_bytes() == first


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_classes_that_are_shown_and_a_refinement(given: list[str], tmp_path: Path) -> None:
    shown = tmp_path / "shown" / "roof"
    shown.mkdir(parents=True)
    checkpoint, picture = (one.partition("=")[2] for one in given[:2])
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 20:] = 255
    Image.open(picture).save(shown / "a.png")
    Image.fromarray(mask).save(shown / "a_mask.png")
    more = [f"exemplars={shown.parent}", "refinement=knn", "refinement.k=3"]
    target = tmp_path / "labels.tif"
    run("map", *given, *more, f"output={target}")
    model = Talk2DINO.from_pretrained(checkpoint, device="cpu")
    classes = {"cat": "cat", "sofa": "sofa", "tree": "tree", "roof": Exemplar(picture, mask)}
    wanted = model.segment(picture, classes, short_side=32, refinement=KNN(k=3)).labels
    assert (wanted == 3).any()
    with rasterio.open(target) as file:
        assert np.array_equal(file.read(1), wanted.numpy())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image=absent.tif"], "image=absent.tif: no such file"),
        (["output=labels.png"], "output=labels.png"),
        (["meters_per_pixel=1"], "no georeference"),
        (["minimum_area=0"], "minimum_area=0: use 1 to"),
        (["minimum_area=50"], "minimum_area=50: does nothing without polygons; add polygons=true"),
        (["bands=[7]"], "bands=[7]"),
        (["background=2"], "background=2"),
        (["exemplars=absent"], "exemplars=absent: no such folder"),
    ],
)
def test_mistakes_are_said_before_the_model_loads(
    given: list[str],
    tmp_path: Path,
    overrides: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Talk2DINO, "from_pretrained", None)
    assert message in fails(capfd, "map", *given, *overrides)


def test_polygons_without_degrees_are_refused_before_the_model_loads(
    given: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Talk2DINO, "from_pretrained", None)
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": 9, "width": 9}
    place = rasterio.transform.from_origin(0, 0, 10, 10)
    with rasterio.open("moon.tif", "w", **profile, crs="IAU_2015:30110", transform=place) as file:
        file.write(np.zeros((1, 9, 9), np.uint8))
    said = fails(capfd, "map", *given, "image=moon.tif", "polygons=true")
    assert "polygons=true: moon.tif has places without longitude and latitude" in said
