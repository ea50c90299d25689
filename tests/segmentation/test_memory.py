"""Working memory, estimated before a picture is decoded: said, or refused with what would help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.datasets.pictures import read_image, size_of, to_pixels
from talk2dino.errors import DataError
from talk2dino.segmentation import PAMR, Segmenter, memory
from talk2dino.segmentation.memory import WorkingMemory, machine_memory
from tests.helpers.encoders import MeanColorEncoder, hash_model


def test_the_estimate_grows_with_what_it_is_made_of() -> None:
    plain, refined = (Segmenter(MeanColorEncoder(), pamr=pamr) for pamr in (None, PAMR()))
    small, large = (
        WorkingMemory.of(plain, (480, 640), 21),
        WorkingMemory.of(plain, (9000, 12000), 21),
    )
    assert large.picture == 40 * 9000 * 12000 and large.encoder == small.encoder
    assert small.total < 1e9 < 4e9 < large.total < 6e9  # measured: 3.0 GB
    many = WorkingMemory.of(plain, (480, 640), 5000)
    assert 1e9 < many.scores < 2e9  # measured: 1.1 GB; all maps at once would be 5.4 GB
    assert WorkingMemory.of(plain, (480, 640), 10_000).scores - many.scores < 0.5e9
    assert WorkingMemory.of(refined, (480, 640), 21).scores - small.scores > 2 * 48 * 4 * 448**2
    assert WorkingMemory.of(plain, (480, 640), 0).scores == 0
    one, three = (
        WorkingMemory.of(Segmenter(MeanColorEncoder(), pamr=PAMR(2, far)), (448, 448), 3)
        for far in ((1,), (1, 2, 4))
    )
    assert three.scores - one.scores == 4 * 448**2 * 8 * 2  # weights of one window


def test_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs" / "one").mkdir(parents=True)
    (tmp_path / "jobs" / "one" / "memory.max").write_text("max\n")
    (tmp_path / "jobs" / "memory.max").write_text("5000\n")
    assert list(memory._group_limits("0::/jobs/one\n", tmp_path)) == [5000]
    (tmp_path / "memory" / "a").mkdir(parents=True)
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text("700")
    old = "4:cpu:/a\n3:memory,x:/a\n0::/jobs\n"
    assert list(memory._group_limits(old, tmp_path)) == [700, 5000]
    assert list(memory._group_limits("0::/not/seen\n", tmp_path / "memory")) == []
    assert 1e8 < machine_memory() < 1e14


@pytest.mark.parametrize(
    ("there", "arguments", "advice"),
    [
        (10_000_000, {}, "scale the picture down, or cut it into tiles$"),
        (45_000_000, {"short_side": 4096}, "use a smaller short_side$"),
        (40_000_000, {"short_side": 512, "pamr": True}, "fewer classes, or pamr=false$"),
    ],
)
def test_what_the_machine_has_no_memory_for_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: int,
    arguments: dict[str, Any],
    advice: str,
) -> None:
    model = hash_model()
    file = tmp_path / "large.png"
    Image.new("RGB", (1000, 500)).save(file)
    monkeypatch.setattr(memory, "machine_memory", lambda: there)
    monkeypatch.setattr("talk2dino.inference.model.to_pixels", None)  # nothing is decoded
    with pytest.raises(
        DataError, match=r"GB of memory, this machine has 0\.0 GB; .*" + advice
    ) as e:
        model.segment(file, ["cat", "sofa"], **arguments)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_an_encoded_picture_is_refused_for_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Talk2DINO = hash_model()
    photo = model.encode(torch.zeros(3, 40, 64, dtype=torch.uint8), short_side=32)
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(DataError, match="image with 2 class prompts: takes about"):
        model.segment([photo], ["cat", "sofa"])


def test_sizes_are_known_without_decoding(tmp_path: Path) -> None:
    picture = Image.new("RGB", (7, 5))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    content = (tmp_path / "turned.jpg").read_bytes()
    pixels = to_pixels(tmp_path / "turned.jpg")
    assert pixels.shape[1:] == (7, 5) == size_of(tmp_path / "turned.jpg")
    assert sorted(size_of(content) or ()) == [5, 7]
    array = pixels.permute(1, 2, 0).numpy()
    for image in (pixels, array, array[..., 0], picture.transpose(Image.Transpose.ROTATE_90)):
        assert size_of(image) == (7, 5)
    for broken in (tmp_path / "none.jpg", b"text", content[:20], None, torch.zeros(3)):
        assert size_of(broken) is None  # type: ignore[arg-type]


def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.png"
    Image.new("L", (50, 50)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", None)
    for read in (to_pixels, read_image, lambda path: to_pixels(path.read_bytes())):
        with pytest.raises(DataError, match=r"more than 2000 pixels.*; scale it down, or cut it"):
            read(file)
