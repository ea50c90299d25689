"""Generated scenes of real photographs as a source."""

from __future__ import annotations

from typing import Any

from PIL import Image

from talk2dino.features.mosaic import MosaicScenes
from talk2dino.features.sources.base import Entry, Source, check_limit


class Mosaic(Source):
    """Generated scenes of real photographs; see `talk2dino.features.mosaic`.

    Args:
        split: `train` or `heldout`.
        count: number of scenes.
        image_size: side of the square scenes in pixels.
        captions_per_scene: captions per scene.
        seed: another seed gives other scenes.
        limit: take only the first scenes.
    """

    def __init__(
        self,
        split: str = "train",
        count: int = 600,
        image_size: int = 224,
        captions_per_scene: int = 5,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.count = min(count, check_limit(limit) or count)
        self.scenes = MosaicScenes(
            split, self.count, image_size, image_size, 4, captions_per_scene, seed
        )

    def __len__(self) -> int:
        return self.count

    def caption_count(self) -> int:
        """Known without composing the scenes."""
        return self.count * self.scenes.captions_per_scene

    def entry(self, index: int) -> Entry:
        """Captions of scene `index`."""
        captions = self.scenes[index].captions
        first = index * self.scenes.captions_per_scene
        return Entry(
            index,
            f"{self.scenes.split}-{index:05d}.png",
            tuple((first + k, text) for k, text in enumerate(captions)),
        )

    def image(self, index: int) -> Image.Image:
        """Compose scene `index`."""
        return Image.fromarray(self.scenes[index].image)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the scenes."""
        scenes = self.scenes
        return {
            "split": scenes.split,
            "seed": scenes.seed,
            "count": self.count,
            "image_size": scenes.height,
            "captions_per_scene": scenes.captions_per_scene,
        }
