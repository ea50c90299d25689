"""Videos: frames in and out with their times, and labels that flicker less and lag little."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from talk2dino.config.command import progress
from talk2dino.errors import ConfigError, DataError, ResultWarning
from talk2dino.inference.vocabulary import EncodedPicture
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures
from talk2dino.segmentation.windows import sliding_windows
from talk2dino.videos.frames import Smoother, segment_video
from talk2dino.videos.video_files import film, frame_pixels
from tests.helpers.encoders import SMALL_CLIP, hash_model
from tests.helpers.pipeline import fails, run

av = pytest.importorskip("av")
from av.sidedata.sidedata import Type  # noqa: E402
from av.stream import Disposition  # noqa: E402


def write(path: Path, frames: list[np.ndarray], seconds: list[float]) -> Path:
    """A lossless video whose frames have these times."""
    with av.open(str(path), "w") as made:
        stream = made.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, second in zip(frames, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return path


def scene(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (5, 8, 3)).repeat(8, 0).repeat(8, 1)
    return [np.uint8((small + random.normal(0, 9, small.shape)).clip(0, 255)) for _ in range(count)]


def encoded(tokens: torch.Tensor) -> EncodedPicture:
    """`[B, P, D]` of two windows with 4 x 4 patches, attention maps of their first two numbers."""
    windows = sliding_windows(32, 64, 32, 32)
    maps = tokens[..., :2].transpose(1, 2)
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    features = WindowFeatures(tokens, maps, (4, 4))
    return EncodedPicture(image, EncodedImage(image, windows, features, (32, 64)))


def shown(smoother: Smoother, tokens: torch.Tensor, level: int) -> bool:
    """Whether patches of a picture of one gray take nothing of the past."""
    picture = replace(encoded(tokens), pixels=torch.full((3, 32, 64), level, dtype=torch.uint8))
    return torch.equal(smoother(picture).windows.features.patch_tokens, tokens)


def test_patches_that_look_alike_keep_nothing_over_a_cut() -> None:
    """Where colors change and nothing corresponds: no flash, no pan, no change of places is one."""
    one, new = (F.normalize(torch.randn(2, 16, 64), dim=-1) for _ in range(2))
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    board = ((rows + columns) % 2 == 0).view(16, 1)
    other = torch.where(board, one[:, :1], new)  # half of them look like a patch of the past
    for level, tokens, cut in (
        (250, other, True),
        (0, other, False),
        (250, one + 0.01 * new, False),  # a flash
        (250, one.roll(4, 1), False),  # a pan
    ):
        smoother = Smoother(0.75)
        assert shown(smoother, one, 0) and smoother.cuts == 0
        assert shown(smoother, tokens, level) is cut and smoother.cuts == cut


def mixed(smoother: Smoother, tokens: torch.Tensor) -> torch.Tensor:
    found = smoother(encoded(tokens)).windows.features
    assert torch.allclose(found.self_attn_maps.transpose(1, 2), found.patch_tokens[..., :2])
    return found.patch_tokens


def test_noise_is_averaged_where_the_patches_are_moved_or_not() -> None:
    """Against a plain moving average of the same patches, which is told where they went."""
    truth = F.normalize(torch.randn(2, 16, 64), dim=-1) * 8
    smoother, shift = Smoother(0.8), 0
    errors, plain = [], []
    for step in range(12):
        shift += step % 3
        noisy = truth.roll(shift, 1) + 0.3 * torch.randn(2, 16, 64)
        found = mixed(smoother, noisy)
        errors.append(float((found - truth.roll(shift, 1)).square().mean()))
        plain.append(float((noisy - truth.roll(shift, 1)).square().mean()))
    assert errors[0] == plain[0]
    assert np.mean(errors[4:]) < 0.4 * np.mean(plain)


def test_what_all_patches_share_does_not_move_them() -> None:
    """Patches that differ little, and a frame that shifts all of them: each keeps its own past."""
    places = F.normalize(torch.randn(2, 16, 64), dim=-1)
    common, other = (F.normalize(torch.randn(1, 1, 64), dim=-1) * 8 for _ in range(2))
    smoother = Smoother(0.8)
    for _ in range(4):
        before = mixed(smoother, places + common)
    found = mixed(smoother, places + common + 0.5 * other)
    assert torch.allclose(before, places + common, atol=1e-2)
    assert torch.allclose(found, places + common + 0.1 * other, atol=1e-2)


def test_a_cut_begins_anew_and_zero_changes_nothing() -> None:
    one, other = (F.normalize(torch.randn(2, 16, 64), dim=-1) for _ in range(2))
    smoother = Smoother(0.9)
    assert torch.equal(mixed(smoother, one), one)
    assert torch.equal(mixed(smoother, other), other)  # no cosine of 64 random numbers is 0.5
    assert torch.equal(mixed(smoother, other[:1]), other[:1])  # another size
    plain = Smoother(0)
    for _ in range(3):
        tokens = one + 0.1 * torch.randn_like(one)
        assert torch.equal(mixed(plain, tokens), tokens)
    for strength in (-0.1, 1, float("nan")):
        with pytest.raises(ConfigError, match="smoothing"):
            Smoother(strength)


def test_frames_keep_their_times_and_the_overlay_is_that_of_the_model(tmp_path: Path) -> None:
    model, times = hash_model(), [0.0, 0.1, 0.3, 0.35, 1.0]
    source = write(tmp_path / "in.mkv", scene(5), times)
    vocabulary = model.open_vocabulary(["cat", "grass", "sofa"], short_side=32)
    told: list[int] = []
    target = tmp_path / "out.mp4"
    found = segment_video(source, target, vocabulary, None, lambda done, _: told.append(done))
    with av.open(str(source)) as opened:
        pictures = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    alone = [vocabulary(one) for one in pictures]
    with av.open(str(target)) as opened:
        frames = list(opened.decode(video=0))
    assert [round(frame.time - frames[0].time, 2) for frame in frames] == times
    for frame, want in zip(frames, alone, strict=True):
        pixels = np.asarray(want.overlay(legend=False), np.int16)
        assert np.abs(frame.to_ndarray(format="rgb24") - pixels).mean() < 12  # H.264 loses a little
    assert (
        found.frames == 5 and found.size == (40, 64) and told == [1, 2, 3, 4, 5, 5]
    )  # of 11 at first
    changed = [float((a.labels != b.labels).double().mean()) for a, b in pairwise(alone)]
    assert found.flicker == pytest.approx(np.mean(changed))
    for name, share in found.shares.items():
        assert share == pytest.approx(np.mean([one.areas()[name] for one in alone]))
    smooth = segment_video(source, target, vocabulary, Smoother(0.9))
    assert smooth.flicker < 0.7 * found.flicker


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from talk2dino.alignment.checkpoint import save_projection
    from talk2dino.alignment.projection import ProjectionLayer
    from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder

    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random", templates="plain")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    psi = tmp_path / "psi.safetensors"
    save_projection(ProjectionLayer(text.embed_dim, vision.embed_dim), psi, specs)
    source, target = write(tmp_path / "in.mp4", scene(3), [0, 0.1, 0.2]), tmp_path / "o" / "out.mp4"
    given = (f"checkpoint={psi}", f"video={source}", "classes=[cat,sofa]", "short_side=32")
    for _ in range(2):  # its own files are replaced
        run("video", *given, f"output={target}")
        assert "3 frames" in capfd.readouterr().out
    figures = json.loads(target.with_suffix(".json").read_text())
    assert (
        figures["frames"] == 3
        and figures["cuts"] == 0
        and sum(figures["shares"].values()) == pytest.approx(1)
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.json", "out.mp4"]
    assert "is the input itself" in fails(capfd, "video", *given, f"output={source}")
    other = write(tmp_path / "mine.mp4", scene(1), [0])
    before = other.read_bytes()
    assert "was not written by" in fails(capfd, "video", *given, f"output={other}")
    assert other.read_bytes() == before
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(source.read_bytes()[:200])
    Image.fromarray(scene(1)[0]).save(tmp_path / "cat.jpg")
    wrong = {
        "none.mp4": "no such file",
        "cat.jpg": "is a picture",
        "broken.mp4": "not a video",
        "psi.safetensors": "not a",
    }
    for name, said in wrong.items():
        asked = (given[0], f"video={tmp_path / name}", *given[2:], f"output={tmp_path / 'x.mp4'}")
        assert said in fails(capfd, "video", *asked)
    run("video", given[0], f"video={other}", *given[2:], f"output={target}")
    assert capfd.readouterr().out.endswith("out.mp4: 1 frames\n")
    assert json.loads(target.with_suffix(".json").read_text())["flicker"] is None
    assert "must end in .mp4" in fails(capfd, "video", *given, "output=x.avi")


def test_a_damaged_video_leaves_nothing(tmp_path: Path) -> None:
    model, source = hash_model(), write(tmp_path / "in.mkv", scene(9), [n / 10 for n in range(9)])
    content = bytearray(source.read_bytes())
    content[len(content) // 3 :] = b""
    source.write_bytes(content)
    vocabulary, target = model.open_vocabulary(["cat"], short_side=32), tmp_path / "out.mp4"
    try:
        found = segment_video(source, target, vocabulary)
    except DataError as error:
        assert "in.mkv" in str(error) and not target.exists()
    else:  # FFmpeg reads what is there
        assert 0 < found.frames < 9 and target.exists()
    assert not list(tmp_path.glob(".*"))


def joined(path: Path, *shapes: tuple[int, int]) -> Path:
    """Transport streams of five frames each, one after another, whose times begin anew."""
    parts = []
    for height, width in shapes:
        with av.open(str(path), "w", format="mpegts") as made:
            stream = made.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for level in range(5):
                pixels = np.full((height, width, 3), 40 * level, np.uint8)
                made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            made.mux(stream.encode(None))
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def times(path: Path) -> list[float]:
    with av.open(str(path)) as opened:
        return [round(float(frame.pts * frame.time_base), 3) for frame in opened.decode(video=0)]


@pytest.mark.parametrize(
    ("degrees", "turn"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]
)
def test_videos_of_telephones_are_turned(
    degrees: int, turn: tuple[int, ...], tmp_path: Path
) -> None:
    """By the display matrix of the file, clockwise as players do."""
    frame = scene(1)[0]
    content = bytearray(write(tmp_path / "in.mp4", [frame], [0]).read_bytes())
    at = content.index(b"tkhd") + 44  # of its version 0
    a, b, c, d = (one << 16 for one in turn)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "in.mp4").write_bytes(content)
    seen: list[np.ndarray] = []
    vocabulary = hash_model().open_vocabulary(["cat", "sofa"], short_side=32)
    encode = vocabulary.encode

    def look(pictures: list[np.ndarray]) -> list[EncodedPicture]:
        seen.extend(pictures)
        return encode(pictures)

    vocabulary = replace(vocabulary, encode=look)
    found = segment_video(tmp_path / "in.mp4", tmp_path / "out.mp4", vocabulary)
    want = np.rot90(frame, -degrees // 90)
    assert found.size == want.shape[:2]
    assert abs(seen[0].astype(int) - want).mean() < 3


def test_what_is_not_as_in_the_video_is_said(tmp_path: Path) -> None:
    """Times that go back, frames of another size, a file that ends too soon, no times at all."""
    vocabulary = hash_model().open_vocabulary(["cat", "sofa"], short_side=32)
    target = tmp_path / "out.mp4"
    with pytest.warns(ResultWarning, match="went back 1 times.*from frame 5 on 5 have another"):
        found = segment_video(joined(tmp_path / "a.ts", (40, 64), (64, 48)), target, vocabulary)
    assert found.frames == 10 and np.allclose(np.diff(times(target)), 0.1)
    source = write(tmp_path / "in.mkv", scene(9), [n / 3 for n in range(9)])
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with pytest.warns(ResultWarning, match=r"only . frames, .* s could be read of 2"):
        assert segment_video(source, target, vocabulary).frames == len(times(target))
    raw = tmp_path / "raw.h264"
    with av.open(str(raw), "w", format="h264") as made:
        stream = made.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 40, 64, "yuv420p"
        for pixels in scene(3):
            made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(stream.encode(None))
    segment_video(raw, target, vocabulary)
    assert times(target) == [0, 0.04, 0.08]


def test_results_never_take_the_place_of_the_video_or_of_a_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.mp4", scene(1), [0]).rename(tmp_path / "out.json")
    given = ("checkpoint=x", "classes=[cat,sofa]", "overwrite=true", f"video={source}")
    said = fails(capfd, "video", *given, f"output={tmp_path / 'out.mp4'}")
    assert "out.json: is the input itself" in said
    (tmp_path / "folder.mp4").mkdir()
    said = fails(capfd, "video", *given, f"output={tmp_path / 'folder.mp4'}")
    assert said.endswith(
        "folder.mp4: is there and was not written by talk2dino.video; use another output"
    )
    text = tmp_path / "notes.txt"
    text.write_text("hello world\n" * 50)  # which FFmpeg would draw
    assert "holds no video" in fails(capfd, "video", *given[:3], f"video={text}")


def stream_of(made: Any, size: tuple[int, int], **options: str) -> Any:
    stream = made.add_stream("libx264", rate=10, options=options)
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    return stream


def frames_of(stream: Any, count: int) -> Iterator[Any]:
    for number, pixels in enumerate(scene(count)):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 10)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def overlay(source: Path) -> tuple[list[float], float]:
    """Times of the frames of the overlay, and how long it says to be."""
    target = source.with_name("overlay.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResultWarning)
        segment_video(source, target, hash_model().open_vocabulary(["a", "b"], short_side=32))
    with av.open(str(target)) as opened:
        return times(target), (opened.duration or 0) / av.time_base


def test_frames_of_files_without_times_of_their_own(tmp_path: Path) -> None:
    """An AVI has no pts; where later frames are referred to, the order of decoding stands there."""
    with av.open(str(tmp_path / "in.avi"), "w") as made:
        stream = stream_of(made, (64, 40), bf="2")
        for packet in frames_of(stream, 30):
            made.mux(packet)
    seconds, length = overlay(tmp_path / "in.avi")
    assert len(seconds) == 30 and np.abs(np.diff(seconds) - 0.1).max() < 1e-4
    assert length == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("tail", [0.0, 2.0])
def test_the_number_of_frames_is_estimated_where_the_file_does_not_say(
    tmp_path: Path, tail: float
) -> None:
    """Matroska has none: by its duration, though sound lasts longer; in the end what was read."""
    with av.open(str(tmp_path / "in.mkv"), "w") as made:
        stream, sound = stream_of(made, (64, 40)), made.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        for packet in frames_of(stream, 20):
            made.mux(packet)
        count = round(8000 * (2 + tail))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, count), np.int16), "s16", "mono")
        samples.rate = 8000
        for packet in (*sound.encode(samples), *sound.encode(None)):
            made.mux(packet)
    told: list[tuple[int, int]] = []
    vocabulary = hash_model().open_vocabulary(["a", "b"], short_side=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        segment_video(
            tmp_path / "in.mkv",
            tmp_path / "out.mp4",
            vocabulary,
            advance=lambda done, total: told.append((done, total)),
        )
    assert told[:20] == [(done, round(10 * (2 + tail))) for done in range(1, 21)]
    assert told[20:] == ([(20, 20)] if tail else [])


def test_a_bar_says_that_it_does_not_know_the_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a raw stream, which has no duration; it said `3/0`."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("frames") as advance:
        advance(3, 0)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "3/?" in said


def test_times_that_slip_do_not_move_what_follows(tmp_path: Path) -> None:
    """Every fifth frame has the time of the one before; one alone is an hour ahead."""
    with av.open(str(tmp_path / "in.mkv"), "w") as made:
        stream = stream_of(made, (64, 40), bf="0", g="1")
        for number, packet in enumerate(frames_of(stream, 40)):
            packet.time_base = Fraction(1, 1000)
            packet.dts = 100 * (number - (number % 5 == 4))
            packet.pts = packet.dts + 3_600_000 * (number == 22)
            made.mux(packet)
    seconds, _ = overlay(tmp_path / "in.mkv")
    right = np.arange(len(seconds)) / 10
    assert len(seconds) >= 39 and np.abs(np.array(seconds) - right).max() < 0.21


def test_the_last_frame_is_shown_as_long_as_it_was(tmp_path: Path) -> None:
    pictures = [Image.fromarray(pixels) for pixels in scene(4)]
    shown = [100, 500, 200, 5000]
    pictures[0].save(tmp_path / "in.gif", save_all=True, append_images=pictures[1:], duration=shown)
    seconds, length = overlay(tmp_path / "in.gif")
    assert seconds == pytest.approx([0, 0.1, 0.6, 0.8]) and length == pytest.approx(5.8, abs=0.01)


def test_pixels_become_squares(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "in.mkv"), "w") as made:
        stream = stream_of(made, (64, 40))
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for packet in frames_of(stream, 2):
            made.mux(packet)
    overlay(tmp_path / "in.mkv")
    with av.open(str(tmp_path / "overlay.mp4")) as opened:
        assert (opened.streams.video[0].width, opened.streams.video[0].height) == (128, 40)


@pytest.mark.parametrize(
    ("signs", "way"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((0, -1, 1, 0), lambda x: np.rot90(x)),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
)
def test_mirrored_frames(signs: tuple[int, ...], way: Callable[[Any], Any]) -> None:
    """As FFmpeg shows them: x' = a x + c y, y' = b x + d y."""
    pixels = scene(1)[0]
    a, b, c, d = (65536 * sign for sign in signs)
    matrix = np.array([[a, b, 0], [c, d, 0], [0, 0, 1 << 30]], np.int32)

    class Side(bytes):
        type = Type.DISPLAYMATRIX

    class Frame:
        side_data = (Side(matrix.tobytes()),)

        def to_ndarray(self, format: str) -> Any:
            return pixels

    np.testing.assert_array_equal(frame_pixels(Frame()), way(pixels))


def test_a_cover_is_no_film(tmp_path: Path) -> None:
    """Songs carry a picture."""
    with av.open(str(tmp_path / "in.mkv"), "w") as made:
        for packet in frames_of(stream_of(made, (64, 40)), 2):
            made.mux(packet)
    with av.open(str(tmp_path / "in.mkv")) as opened:
        assert film(opened) is opened.streams.video[0]

    class Cover:
        disposition = Disposition.attached_pic

    class Streams(list[Any]):
        video = (Cover(),)

        def best(self, kind: str) -> Any:
            return self.video[0]

    class Opened:
        streams = Streams()

    assert film(Opened()) is None
