"""The benchmark that needs no dataset: scenes composed of photographs that packages carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from talk2dino.features.mosaic import CONCEPTS, MosaicScenes
from talk2dino.segmentation.benchmarks import Benchmark, Sample
from talk2dino.segmentation.classes import ClassList, ClassSpec


@dataclass(kw_only=True)
class MosaicBenchmark(Benchmark):
    """Held-out mosaic scenes, see `talk2dino.features.mosaic`; label maps are exact.

    Attributes:
        count: number of scenes.
        height: of a scene in pixels.
        width: of a scene in pixels.
        seed: another seed gives other scenes.
    """

    count: int = 60
    height: int = 224
    width: int = 336
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = min(self.count, self.limit or self.count)
        self._scenes = MosaicScenes("heldout", number, self.height, self.width, seed=self.seed)

    @property
    def class_list(self) -> ClassList:
        """The concepts of the photographs."""
        return ClassList(
            tuple(ClassSpec(c.name, (c.name,), number) for number, c in enumerate(CONCEPTS))
        )

    def __len__(self) -> int:
        return len(self._scenes)

    def image_name(self, index: int) -> str:
        """The scene's number."""
        return f"scene-{index:05d}"

    def sample(self, index: int) -> Sample:
        """Compose scene `index`."""
        scene = self._scenes[index]
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        return Sample(self.image_name(index), image, torch.from_numpy(scene.labels).long())
