"""Videos: frames in, labels smoothed along what corresponds between frames, overlay as mp4 out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import ConfigError, DataError
from talk2dino.files import replacing
from talk2dino.inference.vocabulary import EncodedPicture, OpenVocabulary

NEIGHBORS, TEMPERATURE = 4, 0.05  # patches of the last frame that stand for one, and their softmax
WRITTEN_BY = "talk2dino.video"  # comment of every video of ours
SIMILAR = 0.5  # cosine below which nothing of the last frame stands for a patch


class Smoother:
    """Mixes each patch with the patches of the frames before that look like it.

    A patch takes `strength * (c - 0.5) / 0.5` of its features from the last frame, where `c` is the
    cosine with the most similar patch of that frame in the same window: all of `strength` where
    nothing changed, none after a cut. What is taken is the softmax mean of the four most similar
    ones, which were mixed themselves; so what moves keeps its past. Cosines compare the encoder's
    own tokens, less their mean over the window: what all patches of a frame have in common says
    nothing of places, and may change between frames. Classes, thresholds and refinement see tokens
    as they always do.

    Args:
        strength: 0 keeps every frame by itself; below 1.

    Raises:
        ConfigError: outside 0..1.
    """

    def __init__(self, strength: float = 0.75) -> None:
        if not 0 <= strength < 1:
            raise ConfigError(f"smoothing={strength}: give a share of the past, 0 up to 0.95")
        self.strength = strength
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, picture: EncodedPicture) -> EncodedPicture:
        """The next frame; one of another size begins anew."""
        features = picture.windows.features
        tokens = features.patch_tokens  # [B, P, D]
        maps = features.self_attn_maps.transpose(1, 2)  # [B, P, H]
        own = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
        if self._last is not None and self._last[0].shape == own.shape:
            before, past_tokens, past_maps = self._last
            cosines, places = (own @ before.transpose(1, 2)).topk(
                min(NEIGHBORS, own.shape[1]), dim=-1
            )  # [B, P, n]
            weights = (cosines / TEMPERATURE).softmax(-1)
            share = ((cosines[..., :1] - SIMILAR) / (1 - SIMILAR)).clamp(0, 1) * self.strength
            tokens = torch.lerp(tokens, _gathered(past_tokens, places, weights), share)
            maps = torch.lerp(maps, _gathered(past_maps, places, weights), share)
        self._last = own, tokens, maps
        mixed = replace(features, patch_tokens=tokens, self_attn_maps=maps.transpose(1, 2))
        return replace(picture, windows=replace(picture.windows, features=mixed))


def _gathered(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted means `[B, P, D]` of the rows `[B, P, D]` at `places` `[B, P, n]`."""
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    total = torch.zeros_like(rows)
    for n in range(places.shape[-1]):
        total += weights[..., n, None] * rows[batch, places[..., n]]
    return total


@dataclass(frozen=True)
class VideoFigures:
    """What a video held.

    Attributes:
        frames: how many.
        size: rows and columns.
        shares: of each class, 0..1, mean over the frames.
        flicker: share of pixels whose label is another one than in the frame before, mean.
    """

    frames: int
    size: tuple[int, int]
    shares: dict[str, float]
    flicker: float


def segment_video(
    source: Path,
    target: Path,
    vocabulary: OpenVocabulary,
    smoother: Smoother | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> VideoFigures:
    """Write a video with the classes in color over it; one frame is in memory at a time.

    Frames keep their times. Sound is left out, as are a last row and column that make the size odd.

    Args:
        source: any file that FFmpeg reads.
        target: an mp4 (H.264), complete or not at all.
        vocabulary: classes.
        smoother: or None for every frame by itself.
        advance: is told the frames that are done and their number, 0 if the file does not say.

    Raises:
        DataError: no video, or a damaged one.
        StoreError: the disk is full, or the folder cannot be written.
    """
    import av

    totals: dict[str, float] = {}
    count, changed = 0, 0.0
    last: Tensor | None = None
    with ExitStack() as stack:
        opened = stack.enter_context(open_video(source))
        stream = opened.streams.video[0]
        temporary = stack.enter_context(replacing(target))
        made = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
        made.metadata["comment"] = WRITTEN_BY
        out = made.add_stream("libx264", rate=stream.average_rate or Fraction(25))
        out.pix_fmt = "yuv420p"
        if stream.time_base is not None:
            out.codec_context.time_base = stream.time_base
        frames = opened.decode(stream)
        while (frame := _next(frames, source, count)) is not None:
            picture = vocabulary.encode([_upright(frame)])[0]
            result = vocabulary(smoother(picture) if smoother else picture)
            for name, share in result.areas().items():
                totals[name] = totals.get(name, 0.0) + share
            if last is not None and last.shape == result.labels.shape:
                changed += float((last != result.labels).double().mean())
            last = result.labels
            pixels = np.asarray(result.overlay(legend=False))
            if count == 0:
                out.height, out.width = (length - length % 2 for length in pixels.shape[:2])
            drawn = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels[: out.height, : out.width]), format="rgb24"
            )
            drawn.pts, drawn.time_base = frame.pts, frame.time_base
            made.mux(out.encode(drawn))
            count += 1
            advance(count, stream.frames)
        if last is None:
            raise DataError(f"video={source}: holds no frame that can be read")
        made.mux(out.encode(None))
    shares = {name: total / count for name, total in totals.items()}
    size = (int(last.shape[0]), int(last.shape[1]))
    return VideoFigures(count, size, shares, changed / max(count - 1, 1))


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
    if not opened.streams.video:
        opened.close()
        raise DataError(f"video={source}: holds no video")
    return opened


def is_our_video(path: Path) -> bool:
    """Whether `segment_video` wrote a file."""
    import av

    try:
        with av.open(str(path)) as opened:
            return bool(opened.metadata.get("comment") == WRITTEN_BY)
    except (av.FFmpegError, OSError):
        return False


def _next(frames: Any, source: Path, count: int) -> Any:
    import av

    try:
        return next(frames, None)
    except av.FFmpegError as error:
        raise DataError(f"video={source}: damaged after frame {count} ({error})") from error


def _upright(frame: Any) -> npt.NDArray[np.uint8]:
    """`[H, W, 3]`, turned as the file says."""
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90) % 4)
