"""`OpenVocabulary`: a list of classes bound to a model, for one picture or a million."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from talk2dino.inference.inputs import ImageLike, as_list
from talk2dino.inference.segmented import SegmentedImage, decide
from talk2dino.inference.words import Words
from talk2dino.segmentation.segmenter import EncodedImage, Segmenter


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture behind the encoder: everything slow is done, nothing depends on the classes.

    Attributes:
        pixels: `[3, H, W]` uint8 RGB, the picture, on the CPU.
        windows: its features, on the model's device.
    """

    pixels: Tensor = field(repr=False)
    windows: EncodedImage = field(repr=False)


@dataclass(frozen=True, eq=False)
class OpenVocabulary:
    """Classes whose text embeddings, thresholds and refinement are settled; call it on pictures.

    Made by `Talk2DINO.open_vocabulary`; may be called from several threads.

    Attributes:
        words: names, synonyms and negatives.
        rows: `[N, D]` unit text rows.
        threshold: score of the background, or None.
        segmenter: scores windows with the options of this vocabulary.
        encode: from pictures to encoded pictures, at the working size of this vocabulary.
    """

    words: Words
    rows: Tensor = field(repr=False)
    threshold: float | None
    segmenter: Segmenter = field(repr=False)
    encode: Callable[[Sequence[ImageLike]], list[EncodedPicture]] = field(repr=False)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence, too
        self, image: ImageLike | EncodedPicture
    ) -> SegmentedImage: ...
    @overload
    def __call__(
        self, image: Sequence[ImageLike] | Sequence[EncodedPicture]
    ) -> list[SegmentedImage]: ...
    def __call__(
        self, image: ImageLike | EncodedPicture | Sequence[ImageLike] | Sequence[EncodedPicture]
    ) -> SegmentedImage | list[SegmentedImage]:
        """Segment one picture, or each of a list or `[B, 3, H, W]` batch.

        Args:
            image: as `Talk2DINO.segment` takes it, or an encoded picture, whose working size
                counts then. Pictures of a list may differ in size.

        Raises:
            DataError: not a picture.
        """
        if isinstance(image, EncodedPicture):
            return self._score(image)
        several = as_list(image)  # type: ignore[arg-type]
        if several is None:
            return self._score(self.encode([image])[0])  # type: ignore[list-item]
        return [one for batch in _batches(several) for one in self._segment(batch)]

    def _segment(self, batch: Sequence[ImageLike | EncodedPicture]) -> list[SegmentedImage]:
        """A few pictures, of which some may be encoded already; their windows fill batches."""
        raw = [image for image in batch if not isinstance(image, EncodedPicture)]
        fresh = iter(self.encode(raw))
        return [
            self._score(image if isinstance(image, EncodedPicture) else next(fresh))
            for image in batch
        ]

    @torch.no_grad()
    def _score(self, picture: EncodedPicture) -> SegmentedImage:
        rows = self.rows.to(picture.windows.features.patch_tokens.device)
        classes = torch.tensor(self.words.row_classes, device=rows.device)
        scores = self.segmenter.score(picture.windows, rows, classes)  # [K (+ 1), h, w]
        negative, scores = (scores[:1], scores[1:]) if self.words.has_negatives else (None, scores)
        return decide(picture.pixels, self.words.names, scores, negative, self.threshold)


def _batches(
    images: Sequence[ImageLike | EncodedPicture], size: int = 8
) -> list[Sequence[ImageLike | EncodedPicture]]:
    """Features of eight pictures are held at a time, 20 MB each for a large one."""
    return [images[start : start + size] for start in range(0, len(images), size)]
