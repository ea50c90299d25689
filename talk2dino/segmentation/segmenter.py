"""A vision encoder and a text matrix make a segmenter: image in, label map out.

Two steps: `encode` runs the encoder and does not know the classes; `labels` (or `scores`, where the
scores themselves are wanted) needs neither the encoder nor the picture's file. To try several class
lists, thresholds or refinements on an image, encode it once. Threads may share a segmenter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.datasets.benchmarks.base import Protocol
from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation.class_maps import ClassMaps
from talk2dino.segmentation.labels import contender_labels
from talk2dino.segmentation.refinement.knn import KNN
from talk2dino.segmentation.refinement.pamr import PAMR
from talk2dino.segmentation.scores import (
    class_scores,
    clean_background,
    merge_synonyms,
    resize_scores,
    split_offsets,
    with_background,
)
from talk2dino.segmentation.windows import (
    SeparableScores,
    Window,
    coverage,
    resize_image,
    short_side_size,
    sliding_windows,
)


@dataclass(frozen=True)
class Segmentation:
    """The result for one image.

    Attributes:
        labels: `[H, W]` int64; with a background, 0 is background and classes start at 1.
        scores: `[K, H, W]` float32, background first if there is one; `None` if not asked for.
    """

    labels: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class WindowFeatures:
    """What the encoder saw in `B` windows of one size.

    Attributes:
        patch_tokens: `[B, P, D]`.
        self_attn_maps: `[B, H, P]` logits.
        grid: patch rows and columns.
    """

    patch_tokens: Tensor
    self_attn_maps: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class EncodedImage:
    """An image after the encoder; independent of classes, thresholds and refinement.

    Attributes:
        image: `[3, h, w]` uint8 RGB at working size.
        windows: the rectangles that were encoded.
        features: of all windows, in the same order.
        size: rows and columns of the picture as it was given.
    """

    image: Tensor
    windows: list[Window]
    features: WindowFeatures
    size: tuple[int, int]


class Segmenter(nn.Module):
    """Sliding-window open-vocabulary segmentation (Talk2DINO, inference).

    Per window: sigmoid of the cosine between patch tokens and class embeddings → background
    cleaning [→ kNN] → bilinear to the window [→ PAMR]; windows are averaged, resized to the
    picture, and the best class wins. Text embeddings come with every call and are taken as given:
    unit rows, or calibrated ones with their offsets (`scores.with_offsets`).

    Args:
        vision: `vision(images [B, 3, h, w] float 0..1 RGB)` returns an object with
            `patch_tokens [B, P, D]`, `self_attn_maps [B, H, P]` and `grid`; it normalizes inside.
        protocol: sizes, windows and background, for instance a benchmark.
        pamr: refinement of every window (or of the picture, see `PAMR`), or `None`.
        knn: refinement of token scores among similar patches, or `None`; it compares the encoder's
            own tokens.
        project_patches: maps patch tokens `[..., D]` to the width of the text, for a projection
            whose image side learns (`DoubleMLP`, `VisualProjectionLayer`; see `visual_side`).
            Scores and background cleaning both compare with the text, so both see the projected
            tokens; heads are then pooled after the projection. The attention maps are the
            encoder's. `None` leaves the tokens as they are.
        window_batch_size: windows per encoder call.
        antialias: filter when a window is larger than `input_size`. The original did so from
            torchvision 0.17 on; benchmark windows are never larger, so nothing changes there.
        settings: fields of a `Protocol`, in place of `protocol`.

    Raises:
        ConfigError: `input_size` is no multiple of the encoder's patch size, or the window
            settings are unusable.
        TypeError: a setting that a protocol does not have, or `protocol` and settings together.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation import Segmenter
        >>> from talk2dino.segmentation.segmenter import WindowFeatures
        >>> class MeanColor(torch.nn.Module):  # an encoder whose tokens are mean colors
        ...     patch_size = 8
        ...     def forward(self, images):
        ...         colors = torch.nn.functional.avg_pool2d(images, 8)
        ...         tokens = colors.flatten(2).transpose(1, 2)  # [B, P, D=3]
        ...         return WindowFeatures(tokens, torch.zeros(len(images), 1, 4), (2, 2))
        >>> image = torch.zeros(3, 16, 32, dtype=torch.uint8)
        >>> image[0, :, :16], image[2, :, 16:] = 255, 255  # red beside blue
        >>> segmenter = Segmenter(MeanColor(), window=16, stride=8, short_side=16, input_size=16)
        >>> segmenter(image, text=torch.eye(3)).labels[0, ::8]  # classes: red, green, blue
        tensor([0, 0, 2, 2])
    """

    def __init__(
        self,
        vision: nn.Module,
        protocol: Protocol | None = None,
        *,
        pamr: PAMR | None = None,
        knn: KNN | None = None,
        project_patches: nn.Module | None = None,
        window_batch_size: int = 8,
        antialias: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if protocol is not None and settings:
            raise TypeError(f"give a protocol or its settings {', '.join(settings)}, not both")
        protocol = protocol or Protocol(**settings)
        patch_size = getattr(vision, "patch_size", 1)
        if protocol.input_size % patch_size:
            fitting = max(round(protocol.input_size / patch_size), 1) * patch_size
            raise ConfigError(
                f"input_size={protocol.input_size} is no multiple of the patch size {patch_size}: "
                f"use {fitting}"
            )
        if window_batch_size < 1:
            raise ConfigError(f"window_batch_size={window_batch_size}: use 1 or more")
        self.vision, self.protocol = vision, protocol
        width = getattr(vision, "block_dim", getattr(vision, "embed_dim", None))
        self.background_threshold = protocol.threshold(width)
        self.pamr, self.knn, self.project_patches = pamr, knn, project_patches
        self.window_batch_size, self.antialias = window_batch_size, antialias

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        text: Tensor,
        size: tuple[int, int] | None = None,
        return_scores: bool = False,
        row_classes: Tensor | None = None,
    ) -> Segmentation:
        """Segment one picture.

        Args:
            image: `[3, H, W]` uint8 RGB.
            text: `[K, D]` class embeddings of unit length.
            size: rows and columns of the result; the picture's own by default.
            return_scores: keep all scores too, `K * H * W * 4` bytes.
            row_classes: `[K]` int64 class of every text row, if classes have synonyms.

        Raises:
            DataError: the picture is not `[3, H, W]` uint8, or the text has another width.
        """
        encoded = self.encode(image)
        if not return_scores:
            return Segmentation(self.labels(encoded, text, size, row_classes))
        scores = resize_scores(self.scores(encoded, text, row_classes), *(size or encoded.size))
        scores = with_background(scores, self.background_threshold)
        return Segmentation(scores.argmax(0), scores)

    @torch.no_grad()
    def encode(self, image: Tensor) -> EncodedImage:
        """Resize, cut into windows and encode them: `[3, H, W]` uint8 RGB."""
        return self.encode_batch([image])[0]

    @torch.no_grad()
    def encode_batch(self, images: Sequence[Tensor]) -> list[EncodedImage]:
        """Encode several pictures; windows of different pictures share an encoder batch.

        Every batch but the last holds `window_batch_size` windows, whatever the pictures' sizes.

        Args:
            images: `[3, H, W]` uint8 RGB each, sizes may differ, one device.

        Returns:
            One per picture, in order.

        Raises:
            DataError: a picture is not `[3, H, W]` uint8.
        """
        cut = [self._cut(image) for image in images]
        if not cut:
            return []
        views = (window.crop(working) for working, windows in cut for window in windows)
        every = self.encode_windows(views)
        counts = [len(windows) for _, windows in cut]
        tokens = torch.split(every.patch_tokens, counts)
        maps = torch.split(every.self_attn_maps, counts)
        return [
            EncodedImage(
                working,
                windows,
                WindowFeatures(tokens[i], maps[i], every.grid),
                (images[i].shape[-2], images[i].shape[-1]),
            )
            for i, (working, windows) in enumerate(cut)
        ]

    def _cut(self, image: Tensor) -> tuple[Tensor, list[Window]]:
        """The picture at working size and its windows."""
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise DataError(
                f"image {tuple(image.shape)} {image.dtype}: give [3, H, W] uint8 RGB pixels"
            )
        rows, columns = image.shape[-2:]
        height, width = short_side_size(
            rows, columns, self.protocol.short_side, self.protocol.long_side
        )
        working = resize_image(image, height, width)
        return working, sliding_windows(height, width, self.protocol.window, self.protocol.stride)

    @torch.no_grad()
    def encode_windows(self, windows: Iterable[Tensor]) -> WindowFeatures:
        """Encode `[3, h, w]` RGB windows 0..255 (uint8 or float) of any sizes in full batches.

        The aspect ratio is not kept: every window becomes an `input_size` square, as in the
        original.
        """
        remaining, parts = iter(windows), []
        while batch := [self._square(view) for view in islice(remaining, self.window_batch_size)]:
            parts.append(self.vision(torch.stack(batch)))
        return WindowFeatures(
            torch.cat([part.patch_tokens for part in parts]).float(),
            torch.cat([part.self_attn_maps for part in parts]).float(),
            parts[0].grid,
        )

    def _square(self, view: Tensor) -> Tensor:
        """What the encoder sees of a window: `[3, input_size, input_size]` float 0..1."""
        size = (self.protocol.input_size,) * 2
        pixels = view.float()
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=self.antialias)[0]
        return pixels / 255

    @torch.no_grad()
    def token_scores(
        self, features: WindowFeatures, text: Tensor, row_classes: Tensor | None = None
    ) -> Tensor:
        """Scores of every patch, `[B, K, rows, columns]` float32, cleaned and spread by kNN.

        Synonyms compete after cleaning, each as its own class. Enlarged to the window, and refined
        by PAMR if wanted, this is the original's `generate_masks`.
        """
        tokens, maps = features.patch_tokens, features.self_attn_maps
        with _full_precision(tokens):
            if self.project_patches is not None:
                tokens = self.project_patches(tokens)
            scores = class_scores(tokens, text, features.grid)
            if self.protocol.background_cleaning:
                rows, _ = split_offsets(text, tokens.shape[-1])
                scores = clean_background(scores, tokens, maps, rows, self.protocol.lambda_bg)
            if row_classes is not None:
                scores = merge_synonyms(scores, row_classes)
            if self.knn is not None:
                scores = self.knn(features.patch_tokens, scores)
            return scores

    @torch.no_grad()
    def scores(
        self, encoded: EncodedImage, text: Tensor, row_classes: Tensor | None = None
    ) -> Tensor:
        """Average the refined windows: `[K, h, w]` float32 at working size."""
        return self.class_maps(encoded, text, row_classes)[:]

    @torch.no_grad()
    def class_maps(
        self, encoded: EncodedImage, text: Tensor, row_classes: Tensor | None = None
    ) -> ClassMaps:
        """The same scores, of which no more than the working memory are held at once."""
        tokens = self.token_scores(encoded.features, text, row_classes)
        with _full_precision(tokens):
            enlarge = self._at_working_size(encoded)

            def in_full_precision(some: Tensor) -> Tensor:
                with torch.no_grad(), _full_precision(some):
                    return enlarge(some)

            size = (encoded.image.shape[-2], encoded.image.shape[-1])
            return ClassMaps(tokens, in_full_precision, size)

    def _at_working_size(self, encoded: EncodedImage) -> Callable[[Tensor], Tensor]:
        """From token scores `[B, n, r, c]` to averaged, refined scores `[n, h, w]`, for any n."""
        windows, size = encoded.windows, (encoded.image.shape[-2], encoded.image.shape[-1])

        def average(tokens: Tensor) -> Tensor:
            return SeparableScores(tokens, windows, size, size).full()

        if self.pamr is None:
            return average
        if self.pamr.whole_image:
            [refine] = self.pamr.prepare([encoded.image])
            return lambda tokens: refine(average(tokens))
        refiners = list(self.pamr.prepare(window.crop(encoded.image) for window in windows))
        share = coverage(windows, *size).reciprocal_().to(encoded.image.device)

        def refine_windows(tokens: Tensor) -> Tensor:
            total = tokens.new_zeros(tokens.shape[1], *size)
            for refine, window, one in zip(refiners, windows, tokens, strict=True):
                refine.add_to(window.crop(total), one, window.crop(share))
            return total

        return refine_windows

    @torch.no_grad()
    def labels(
        self,
        encoded: EncodedImage,
        text: Tensor,
        size: tuple[int, int] | None = None,
        row_classes: Tensor | None = None,
    ) -> Tensor:
        """The best class of every pixel, `[H, W]` int64, without keeping the scores.

        Without PAMR no score is ever held at the size of the picture for more than a few classes;
        with it, classes that cannot win are not refined (`labels.contender_labels`).

        Args:
            encoded: from `encode` or `encode_batch`.
            text: `[K, D]` class embeddings of unit length.
            size: rows and columns of the result; the picture's own by default.
            row_classes: `[K]` int64 class of every text row, if classes have synonyms.
        """
        size, threshold = size or encoded.size, self.background_threshold
        tokens = self.token_scores(encoded.features, text, row_classes)
        with _full_precision(tokens):
            if self.pamr is not None:
                return contender_labels(tokens, self._at_working_size(encoded), size, threshold)
            working = (encoded.image.shape[-2], encoded.image.shape[-1])
            return SeparableScores(tokens, encoded.windows, working, size).labels(threshold)


def _full_precision(like: Tensor) -> torch.autocast:
    """Scores are decided in float32 whatever precision surrounds the encoder."""
    return torch.autocast(like.device.type, enabled=False)
