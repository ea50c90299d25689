"""Videos: frames in, labels smoothed along what corresponds between frames, overlay as mp4 out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor

from talk2dino.errors import Advance, DataError, check_number
from talk2dino.files import replacing
from talk2dino.inference.vocabulary import EncodedPicture, OpenVocabulary
from talk2dino.videos.video_files import WRITTEN_BY, Frames, film, frame_pixels, open_video

NEIGHBORS, TEMPERATURE = 4, 0.05  # patches of the last frame that stand for one, and their softmax
SIMILAR = 0.5  # cosine below which nothing of the last frame stands for a patch
RECOLORED = 0.3  # share of pixels whose color the last frame had too rarely, at least, in a cut
KEPT = 0.05  # share of patches that correspond, at most, in a cut


class Smoother:
    """Mixes each patch with the patches of the frames before that look like it.

    A patch takes `strength * (c - 0.5) / 0.5` of its features from the last frame, where `c` is the
    cosine with the most similar patch of that frame in the same window: all of `strength` where
    nothing changed, none where nothing is alike. What is taken is the softmax mean of the four most
    similar ones, which were mixed themselves; so what moves keeps its past. Cosines compare the
    encoder's own tokens, less their mean over the window: what all patches of a frame have in
    common says nothing of places, and may change between frames. Classes, thresholds and refinement
    see tokens as they always do.

    After a cut nothing of the past is taken, though patches look alike: most colors are others, and
    next to no patches are each other's most similar ones and have a neighbor that moved with them.

    Args:
        strength: 0 keeps every frame by itself; 0.99 at most.

    Attributes:
        cuts: how many there were.

    Raises:
        ConfigError: out of that range.
    """

    def __init__(self, strength: float = 0.75) -> None:
        check_number("smoothing", strength, 0.0, 0.99)
        self.strength = strength
        self.cuts = 0
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, picture: EncodedPicture) -> EncodedPicture:
        """The next frame; one of another size begins anew."""
        features = picture.windows.features
        tokens = features.patch_tokens  # [B, P, D]
        maps = features.self_attn_maps.transpose(1, 2)  # [B, P, H]
        own = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
        colors = _colors(picture.pixels)
        if self._last is not None and self._last[0].shape == own.shape:
            before, past_tokens, past_maps, past_colors = self._last
            alike = own @ before.transpose(1, 2)  # [B, P, P]
            recolored = float((colors - past_colors).clamp(min=0).sum())
            if recolored > RECOLORED and _corresponding(alike, features.grid) < KEPT:
                self.cuts += 1
            else:
                cosines, places = alike.topk(min(NEIGHBORS, own.shape[1]), dim=-1)  # [B, P, n]
                weights = (cosines / TEMPERATURE).softmax(-1)
                share = ((cosines[..., :1] - SIMILAR) / (1 - SIMILAR)).clamp(0, 1) * self.strength
                tokens = torch.lerp(tokens, _gathered(past_tokens, places, weights), share)
                maps = torch.lerp(maps, _gathered(past_maps, places, weights), share)
        self._last = own, tokens, maps, colors
        mixed = replace(features, patch_tokens=tokens, self_attn_maps=maps.transpose(1, 2))
        return replace(picture, windows=replace(picture.windows, features=mixed))


def _colors(pixels: Tensor) -> Tensor:
    """Shares of 8 x 8 x 8 colors, `[512]`, of `[3, H, W]` uint8."""
    red, green, blue = (pixels.flatten(1) // 32).int()
    counts = torch.bincount(red * 64 + green * 8 + blue, minlength=512)
    return counts / counts.sum()


def _corresponding(alike: Tensor, grid: tuple[int, int]) -> float:
    """Share of patches whose most similar ones find them again, as do those of a neighbor.

    Args:
        alike: cosines `[B, P, P]` of patches with those of the last frame.
        grid: rows and columns of the P patches; two neighbors move alike but for one patch.
    """
    places, numbers = alike.argmax(2), torch.arange(alike.shape[1], device=alike.device)
    mutual = (alike.argmax(1).gather(1, places) == numbers).view(-1, *grid)
    down, across = (places // grid[1] - numbers // grid[1], places % grid[1] - numbers % grid[1])
    moved = torch.stack([down, across]).view(2, -1, *grid)
    found = torch.zeros_like(mutual)
    for axis in (1, 2):
        together = (moved.diff(dim=axis + 1).abs() <= 1).all(0)
        sides = [(axis, first, grid[axis - 1] - 1) for first in (0, 1)]
        for side in sides:
            together &= mutual.narrow(*side)
        for side in sides:
            found.narrow(*side).logical_or_(together)
    return float(found.double().mean())


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
        flicker: share of pixels whose label is another one than in the frame before, mean; None
            where no two frames were compared.
        cuts: between frames; None without a smoother, which finds them.
    """

    frames: int
    size: tuple[int, int]
    shares: dict[str, float]
    flicker: float | None
    cuts: int | None = None


def segment_video(
    source: Path,
    target: Path,
    vocabulary: OpenVocabulary,
    smoother: Smoother | None = None,
    advance: Advance = lambda done, total: None,
) -> VideoFigures:
    """Write a video with the classes in color over it; six frames are in memory at a time.

    Frames keep their times, and have square pixels. Sound is left out, as are a last row and column
    that make the size odd. What cannot be decoded, and frames of another size or without a time of
    their own, are said (`ResultWarning`); the overlay has the size of the first frame.

    Args:
        source: any file that FFmpeg reads.
        target: an mp4 (H.264), complete or not at all.
        vocabulary: classes.
        smoother: or None for every frame by itself.
        advance: is told the frames that are done and their number: as the file says it, else by its
            duration and rate, 0 without one; in the end what was read.

    Raises:
        DataError: no video, or no frame that can be decoded.
        WriteError: the disk is full, or the folder cannot be written.
    """
    import av

    totals: dict[str, float] = {}
    count, changed, pairs = 0, 0.0, 0
    earlier = smoother.cuts if smoother else 0
    last: Tensor | None = None
    with ExitStack() as stack:
        opened = stack.enter_context(open_video(source))
        stream = film(opened)
        temporary = stack.enter_context(replacing(target))
        made = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
        made.metadata["comment"] = WRITTEN_BY
        rate = stream.average_rate or Fraction(25)
        # without frames that refer to later ones, whose times would end before their pictures
        out = made.add_stream("libx264", rate=rate, options={"bf": "0"})
        out.pix_fmt = "yuv420p"
        frames = Frames(opened, stream, rate)
        out.codec_context.time_base = frames.base
        held: list[Any] = []  # the last packet, which has to say how long its frame is shown
        for frame in frames:
            picture = vocabulary.encode([frame_pixels(frame, stream.sample_aspect_ratio)])[0]
            result = vocabulary(smoother(picture) if smoother else picture)
            for name, share in result.areas().items():
                totals[name] = totals.get(name, 0.0) + share
            if last is not None and last.shape == result.labels.shape:
                changed += float((last != result.labels).double().mean())
                pairs += 1
            last = result.labels
            overlay = result.overlay(legend=False)
            if count == 0:
                size = overlay.size
                out.width, out.height = (length - length % 2 for length in size)
                if not out.width or not out.height:
                    raise DataError(f"video={source}: frames of {size[0]}x{size[1]} are too small")
            elif overlay.size != size:
                frames.other.append(count)
                overlay = ImageOps.pad(overlay, size)
            pixels = np.asarray(overlay)[: out.height, : out.width]
            drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            drawn.pts, drawn.time_base = frames.time, frames.base
            held = _mux(made, [*held, *out.encode(drawn)])
            count += 1
            advance(count, max(count, frames.expected) if frames.expected else 0)
        if frames.expected > count:
            advance(count, count)
        if last is None:
            raise DataError(f"video={source}: holds no frame that can be read{frames.error}")
        [last_packet] = _mux(made, [*held, *out.encode(None)])
        last_packet.duration = round(frames.shown * frames.base / last_packet.time_base)
        made.mux(last_packet)
        frames.say(f"video={source}", count)
    shares = {name: total / count for name, total in totals.items()}
    size = (int(last.shape[0]), int(last.shape[1]))
    cuts = smoother.cuts - earlier if smoother else None
    return VideoFigures(count, size, shares, changed / pairs if pairs else None, cuts)


def _mux(made: Any, packets: list[Any]) -> list[Any]:
    """Write all packets but the last, which comes back."""
    for packet in packets[:-1]:
        made.mux(packet)
    return packets[-1:]
