"""Files of videos: the stream that is shown, its frames in time, upright and with square pixels."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talk2dino.errors import DataError, say

WRITTEN_BY = "talk2dino.video"  # comment of every video of ours
DAMAGED = 10_000  # packets that cannot be decoded, after which a video ends
FINE = 90_000  # ticks a second at least, so that a frame can be moved by next to nothing
AHEAD = 4  # frames that are looked at before the time of one is chosen
JUMP = 1.0  # seconds by which a frame alone is too far ahead


def open_video(source: Path) -> Any:
    """A file's container, with a video in it.

    Raises:
        DataError: no such file, or none with a video.
    """
    import av

    if not source.is_file():
        raise DataError(f"video={source}: no such file")
    try:
        opened = av.open(str(source))
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"video={source}: not a video that can be read ({error})") from error
    if opened.format.name.endswith("_pipe") or opened.format.name == "image2":
        opened.close()
        raise DataError(f"video={source}: is a picture; python -m talk2dino.segment takes it")
    if film(opened) is None or opened.format.name == "tty":  # which draws any text
        opened.close()
        raise DataError(f"video={source}: holds no video")
    return opened


def film(opened: Any) -> Any:
    """The stream of a container that is shown, none of covers; None if there is none."""
    from av.stream import Disposition

    shown = [s for s in opened.streams.video if not s.disposition & Disposition.attached_pic]
    best = opened.streams.best("video")
    return best if best in shown else next(iter(shown), None)


def is_our_video(path: Path) -> bool:
    """Whether `segment_video` wrote a file."""
    import av

    try:
        with av.open(str(path)) as opened:
            return bool(opened.metadata.get("comment") == WRITTEN_BY)
    except (av.FFmpegError, OSError):
        return False


class Frames:
    """The frames that can be decoded, each later than the one before; counts what is not as it was.

    A time at or before the last one is moved behind it by a tick; where frames go back and stay
    there, as where files were joined, what follows is moved along. A single frame that is far ahead
    of its neighbors gets a time between them.

    Args:
        opened: the file.
        stream: its video.
        rate: frames a second, where they do not say their time.

    Attributes:
        base: seconds of a tick.
        time: of the frame that was given last, in ticks.
        shown: how long that frame is shown, in ticks.
        expected: frames that the file promises, or that fill its duration; 0 if it has neither.
        seconds: from the first frame to the end of the last.
        other: numbers of frames of another size than the first.
        error: of the first packet that could not be decoded.
    """

    def __init__(self, opened: Any, stream: Any, rate: Fraction) -> None:
        import av

        self.opened, self.stream, self.rate = opened, stream, rate
        self.damaged, self.corrupt, self.moved = 0, 0, 0
        self.given = Fraction(stream.time_base or 1 / rate)  # of the file's own ticks
        self.finer = max(1, math.ceil(self.given * FINE))
        self.base = self.given / self.finer
        self.time, self.shown, self.seconds, self.read = 0, 1, 0.0, 0.0
        self.other: list[int] = []
        self.error = ""
        own = float((stream.duration or 0) * self.given)
        whole = max(0.0, ((opened.duration or 0) - max(opened.start_time or 0, 0)) / av.time_base)
        alone = len(opened.streams) == 1  # others may be longer
        self.promised = own or (whole if alone else 0.0)
        self.expected = int(stream.frames or round((own or whole) * rate))

    def __iter__(self) -> Iterator[Any]:
        step = max(1, round(1 / (self.rate * self.base)))
        first, last, late, before = None, None, 0, None
        for frame, wanted, following in _with_next(self._timed()):
            wanted = (0 if last is None else last + step) if wanted is None else wanted + late
            if last is None:
                first = wanted
            elif wanted <= last:
                self.moved += 1
                if following is not None and wanted - late < following <= last - late:
                    late += last + step - wanted  # joined files
                    wanted = last + step
                else:
                    wanted = last + (step if following is None else 1)
            elif (
                following is not None
                and last < following + late
                and (wanted - following - late) * self.base > JUMP
            ):  # alone ahead of all
                self.moved += 1
                wanted = min(last + step, following + late - 1)
            self.shown = round((getattr(frame, "duration", 0) or 0) * self.finer) or before or step
            before = None if last is None else wanted - last
            self.time = last = wanted
            end = float((wanted + self.shown) * self.base)
            self.seconds = end - float((first or 0) * self.base)
            self.read = max(self.read, end, self.seconds)  # files count from 0, or from the first
            self.corrupt += bool(frame.is_corrupt)
            yield frame

    def _timed(self) -> Iterator[tuple[Any, int | None]]:
        """Frames with their times in ticks: pts or, where these go back more often, dts.

        So does FFmpeg; an AVI has no pts, and what stands there is the order of decoding. A few
        frames are waited for, so that the first ones are judged, too.
        """
        seen: dict[str, int] = {}
        faults = {"pts": 0, "dts": 0}
        waiting: deque[Any] = deque()

        def timed() -> tuple[Any, int | None]:
            frame = waiting.popleft()
            plain = frame.pts is not None and (faults["pts"] <= faults["dts"] or frame.dts is None)
            time = frame.pts if plain else frame.dts
            return frame, None if time is None else time * self.finer

        for frame in self._decoded():
            for kind in faults:
                now = getattr(frame, kind)
                if now is not None:
                    faults[kind] += now <= seen.get(kind, now - 1)
                    seen[kind] = now
            waiting.append(frame)
            if len(waiting) > AHEAD:
                yield timed()
        while waiting:
            yield timed()

    def _decoded(self) -> Iterator[Any]:
        """Frame by frame; a packet that cannot be decoded is left out."""
        import av

        packets = self.opened.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                found = packet.decode()
            except av.FFmpegError as error:
                self.damaged += 1
                self.error = self.error or f" ({error})"
                if packet is None or self.damaged > DAMAGED:
                    return
                continue
            yield from found

    def say(self, name: str, count: int) -> None:
        """Warn of what the overlay has otherwise than the video."""
        said = []
        if self.damaged:
            said.append(f"{self.damaged} parts could not be decoded and are left out{self.error}")
        if self.corrupt:
            said.append(f"{self.corrupt} frames are damaged")
        if count < self.stream.frames or self.read < 0.98 * self.promised - 0.3:
            least = f"{count} frames, {self.seconds:.1f} s"
            said.append(f"only {least} could be read of {self.promised:.1f} s")
        if self.moved:
            said.append(f"times went back {self.moved} times; frames follow each other there")
        if self.other:
            said.append(f"from frame {self.other[0]} on {len(self.other)} have another size")
        if said:
            say(f"{name}: {'; '.join(said)}", stacklevel=3)


def _with_next(
    timed: Iterator[tuple[Any, int | None]],
) -> Iterator[tuple[Any, int | None, int | None]]:
    """Each frame, its time, and that of the next one."""
    held = next(timed, None)
    for following in timed:
        yield *held, following[1]  # type: ignore[misc]
        held = following
    if held is not None:
        yield *held, None


def frame_pixels(frame: Any, aspect: Fraction | None = None) -> npt.NDArray[np.uint8]:
    """`[H, W, 3]`, turned and mirrored as the file says; pixels of an aspect become squares."""
    from av.sidedata.sidedata import Type

    pixels: npt.NDArray[np.uint8] = _square(frame, aspect).to_ndarray(format="rgb24")
    found = [one for one in frame.side_data if one.type == Type.DISPLAYMATRIX]
    if not found:
        return pixels
    matrix = np.frombuffer(bytes(found[0]), np.int32).reshape(3, 3)[:2, :2].astype(float)
    if abs(matrix[0, 1]) > abs(matrix[0, 0]):  # x comes from y
        pixels = pixels.swapaxes(0, 1)
        across, down = matrix[1, 0], matrix[0, 1]
    else:
        across, down = matrix[0, 0], matrix[1, 1]
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _square(frame: Any, aspect: Fraction | None) -> Any:
    """The frame with pixels as wide as high, none of them thrown away."""
    if not aspect or aspect == 1:
        return frame
    width, height = frame.width, frame.height
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)
    return frame.reformat(width, height)
