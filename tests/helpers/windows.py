"""Scores of windows and their average, step by step: what the segmenter's short ways must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation.refinement.pamr import PAMR
from talk2dino.segmentation.scores import upsample
from talk2dino.segmentation.segmenter import Segmenter
from talk2dino.segmentation.windows import Window, coverage, sliding_windows
from tests.helpers.encoders import FixedEncoder
from tests.helpers.goldens import golden_arrays


def window_scores(
    segmenter: Segmenter, windows: Tensor, text: Tensor, row_classes: Tensor | None = None
) -> Tensor:
    """Scores `[B, K, h, w]` of windows `[B, 3, h, w]`: the original's `generate_masks`."""
    tokens = segmenter.token_scores(segmenter.encode_windows(windows), text, row_classes)
    if segmenter.pamr is not None:
        return segmenter.pamr(windows, tokens)
    return upsample(tokens, windows.shape[-2], windows.shape[-1])


@dataclass
class GoldenScores:
    """Windows that the original scored: `[B, 3, h, w]` RGB, text `[K, D]`, every nth class kept."""

    segmenter: Segmenter
    windows: Tensor
    text: Tensor
    every: int
    want: Tensor

    def scores(self, device: torch.device) -> Tensor:
        """Ours, on the CPU, computed on `device`."""
        segmenter = self.segmenter.to(device)
        got = window_scores(segmenter, self.windows.to(device), self.text.to(device))
        return got[:, :: self.every].cpu()


def golden_segmenters() -> Iterator[GoldenScores]:
    """Every output of the original's `generate_masks`."""
    arrays = golden_arrays("generate_masks")
    for case, settings in (key.split("/out/") for key in arrays if "/out/" in key):
        segmenter = Segmenter(
            FixedEncoder(arrays[f"{case}/patch_tokens"], arrays[f"{case}/self_attn_maps"]),
            input_size=int(arrays[f"{case}/resize_dim"]),
            background_cleaning="bg1" in settings,
            lambda_bg=0.5 if "lambda0.5" in settings else 0.2,
            pamr=PAMR() if "pamr1" in settings else None,
        )
        rgb, text = arrays[f"{case}/image_bgr"].flip(1), arrays[f"{case}/text_emb"]
        every = 4 if settings.endswith("every4th") else 1
        want = arrays[f"{case}/out/{settings}"]
        yield GoldenScores(segmenter, rgb, text, every, want)


def stitch(scores: Iterable[Tensor], windows: Iterable[Window], height: int, width: int) -> Tensor:
    """Average window scores where windows overlap.

    Args:
        scores: one `[K, y2-y1, x2-x1]` tensor per window; a generator keeps one in memory.
        windows: the rectangles, in the same order; together they cover the picture.
        height: rows of the picture.
        width: columns of the picture.

    Returns:
        `[K, height, width]` in the dtype of the scores.

    Raises:
        DataError: a score map does not have its window's size, or there is no window.
    """
    total: Tensor | None = None
    windows = list(windows)
    for values, window in zip(scores, windows, strict=True):
        if total is None:
            total = values.new_zeros(values.shape[0], height, width)
        target = window.crop(total)
        if target.shape != values.shape:
            raise DataError(
                f"window {tuple(window)} holds {tuple(target.shape)} values "
                f"but its scores are {tuple(values.shape)}: return [K, y2-y1, x2-x1]"
            )
        target += values
    if total is None:
        raise DataError("no windows to stitch: pass the list of sliding_windows(...)")
    return total.div_(coverage(windows, height, width).to(total))


def slide(
    image: Tensor,
    window_scores: Callable[[Tensor], Tensor],
    window: int = 448,
    stride: int = 224,
) -> Tensor:
    """Apply `window_scores` to every window of `image` and average the overlaps.

    Args:
        image: `[3, h, w]`, any dtype.
        window_scores: `[1, 3, y2-y1, x2-x1]` to `[1, K, y2-y1, x2-x1]`.
        window: side of a window, in pixels.
        stride: distance between windows, in pixels.

    Returns:
        `[K, h, w]` (mmsegmentation `slide_inference`).
    """
    height, width = image.shape[-2:]
    windows = sliding_windows(height, width, window, stride)
    scores = (window_scores(place.crop(image)[None])[0] for place in windows)
    return stitch(scores, windows, height, width)
