"""`Talk2DINO`: the whole model as one Python object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.alignment.projection import Projection
from talk2dino.alignment.projection_base import visual_side
from talk2dino.alignment.texts import embed_texts
from talk2dino.encoders.build import build_text, build_vision
from talk2dino.encoders.device import choose_device
from talk2dino.encoders.hub import WEIGHTS, resolve_checkpoint
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError
from talk2dino.features.extraction import crop_square
from talk2dino.features.pictures import upright_rgb
from talk2dino.segmentation.benchmarks import read_image
from talk2dino.segmentation.classes import BACKGROUND, embed_classes
from talk2dino.segmentation.overlay import overlay
from talk2dino.segmentation.pamr import PAMR
from talk2dino.segmentation.segmenter import Segmenter

ImageLike = Image.Image | str | Path | Tensor


@dataclass(frozen=True)
class SegmentedImage:
    """A segmented picture.

    Attributes:
        labels: [H, W] int64, index into `classes`.
        scores: [N, H, W] float32, a map per class.
        classes: names; the first is "background" if a background was asked for.
        image: [3, H, W] uint8, the picture.
    """

    labels: Tensor
    scores: Tensor
    classes: list[str]
    image: Tensor = field(repr=False)

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The picture with the classes in colour and a legend."""
        picture = Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy())
        return overlay(picture, self.labels, self.classes, alpha=alpha, legend=legend)


class Talk2DINO(nn.Module):
    """A vision encoder, a text encoder, and the projection that connects them.

    Args:
        vision: frozen vision encoder.
        text: frozen text encoder.
        projection: trained on features of these two.

    Raises:
        CheckpointError: the projection's widths are not those of the encoders.
    """

    def __init__(
        self, vision: TimmVisionEncoder, text: TextEncoder, projection: Projection
    ) -> None:
        super().__init__()
        for key, width, encoder, wanted in (
            ("vision", vision.embed_dim, vision, projection.vision_dim),
            ("text", text.embed_dim, text, projection.text_dim),
        ):
            if width != wanted:
                raise CheckpointError(
                    f"the checkpoint was trained for a {key} encoder of width {wanted}, but "
                    f"{getattr(encoder, 'name', key)} has {width}; choose its encoder with {key}=…"
                )
        self.vision, self.text, self.projection = vision, text, projection.eval()

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        device: str | torch.device | None = None,
        vision: TimmVisionEncoder | None = None,
        text: TextEncoder | None = None,
    ) -> Talk2DINO:
        """Load from a folder, a checkpoint file of any format, or a Hub id.

        Args:
            location: see `checkpoint=` in the README.
            device: where to run; None takes the best there is.
            vision: needed for an original `.pth`, which does not name its encoders.
            text: likewise.

        Raises:
            CheckpointError: nothing there, unreadable, or without encoders.
        """
        path = resolve_checkpoint(location)
        checkpoint = read_checkpoint(path)
        if vision is None:
            vision = build_vision(_required(checkpoint.vision, "vision", path))
        if text is None:
            text = build_text(_required(checkpoint.text, "text", path))
        model = cls(vision, text, checkpoint.projection)
        return model.to(choose_device() if device is None else torch.device(device))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `projection.safetensors`, which also names the encoders; returns the file."""
        path = Path(folder) / WEIGHTS
        specs = {"vision": self.vision.spec, "text": self.text.describe()["spec"]}
        save_projection(self.projection, path, specs)
        return path

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload to the Hugging Face Hub, which needs a login; returns the address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(folder)
            return str(api.upload_file(path_or_fileobj=path, path_in_repo=WEIGHTS, repo_id=repo_id))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.projection.parameters()).device

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """ψ of texts, [N, D] float32, not normalised; a single text is a list of one."""
        texts = [texts] if isinstance(texts, str) else texts
        embeddings = embed_texts(texts, self.text, self.projection)
        return self.projection.project_embedding(embeddings)

    @torch.no_grad()
    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Patch tokens of one picture or several: [B, P, D], in the encoder's precision.

        Each picture is resized and centre-cropped to the encoder's `image_size`, as in extraction.
        A projection with an image side is applied, so that the tokens compare with `encode_text`.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str)
        batch: Sequence[ImageLike] = images if several else [images]  # type: ignore[assignment, list-item]
        if not batch:
            raise DataError("images: the list is empty; give at least one picture")
        size = self.vision.image_size
        pixels = torch.stack([crop_square(to_picture(to_pixels(i)), size) for i in batch])
        tokens: Tensor = self.vision(pixels.to(self.device).float() / 255).patch_tokens
        return self.projection.project_visual(tokens)

    @torch.no_grad()
    def segment(
        self,
        image: ImageLike,
        classes: Sequence[str] | Mapping[str, Sequence[str]],
        background: bool | float = False,
        pamr: bool = False,
        short_side: int | None = None,
        templates: str | None = None,
    ) -> SegmentedImage:
        """Segment a picture into named classes.

        Args:
            image: PIL image, path, or [3, H, W] tensor (uint8, or float in 0..1).
            classes: names, or a mapping of a name to the synonyms that stand for it.
            background: True, or a threshold of the score, adds a background class in front and
                cleans the scores by the attention maps; True is 0.55.
            pamr: refine the edges.
            short_side: working size in pixels, rounded to whole patches; None takes 448.
            templates: prompt templates; None takes those that suit the text encoder.

        Raises:
            ConfigError: no class.
            DataError: not a picture.
        """
        named = classes if isinstance(classes, Mapping) else {name: (name,) for name in classes}
        if not named or not all(name.strip() for name in named):
            raise ConfigError("classes: the list is empty or has an empty name; use [cat,sofa]")
        threshold = (0.55 if background is True else float(background)) if background else None
        rows, row_classes = embed_classes(
            list(named.values()), self.text, self.projection, templates
        )
        pixels = to_pixels(image)
        segmenter = self.segmenter(threshold, pamr, short_side)
        result = segmenter(
            pixels.to(self.device), rows, return_scores=True, row_classes=row_classes
        )
        names = [BACKGROUND, *named] if threshold is not None else list(named)
        assert result.scores is not None
        return SegmentedImage(result.labels.cpu(), result.scores.cpu(), names, pixels)

    def segmenter(
        self, threshold: float | None, pamr: bool, short_side: int | None = None
    ) -> Segmenter:
        """The sliding-window segmenter for whole pictures, windows of 448 pixels and alike."""
        patch = self.vision.patch_size
        side = max(patch, round((short_side or 448) / patch) * patch)
        return Segmenter(
            self.vision,
            window=side,
            stride=max(1, side // 2),
            short_side=side,
            input_size=side,
            background_cleaning=threshold is not None,
            background_threshold=threshold,
            pamr=PAMR() if pamr else None,
            project_patches=visual_side(self.projection),
        )


def _required(spec: dict[str, Any] | None, kind: str, path: Path) -> dict[str, Any]:
    if spec is None:
        raise CheckpointError(
            f"checkpoint={path}: does not name its {kind} encoder; say it with {kind}=…"
        )
    return spec


def to_pixels(image: ImageLike) -> Tensor:
    """Bring a picture to [3, H, W] uint8 RGB on the CPU.

    Raises:
        DataError: unreadable file, or a tensor of another shape, type or range.
    """
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise DataError(f"image={image}: no such file")
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(getattr(image, "shape", ()))
        raise DataError(f"image: {type(image).__name__} {shape}; give [3, H, W], a path or PIL")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise DataError(f"image: {image.dtype} tensor; give uint8, or float within 0..1")
    return (image.cpu().float() * 255).round().to(torch.uint8)


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] uint8 as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
