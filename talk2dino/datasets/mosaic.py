"""Mosaic scenes: real photographs cut and composed, with captions and exact label maps.

The scenes serve as a source of captioned images and, with other parts of the photographs, as a
benchmark.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from talk2dino.datasets.benchmarks.base import Benchmark, Sample
from talk2dino.datasets.benchmarks.classes import ClassList, ClassSpec
from talk2dino.datasets.captions.base import Entry, Source, check_limit
from talk2dino.errors import DataError, check_number

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Concept:
    """A thing that a photograph shows.

    Attributes:
        name: class name in the benchmark.
        phrase: how a caption says it, with its article.
        photo: package and file below it.
        train: x0, y0, x1, y1 in pixels; training crops lie inside.
        heldout: the same for held-out crops; the boxes do not overlap.
    """

    name: str
    phrase: str
    photo: tuple[str, str]
    train: Box
    heldout: Box


def _skimage(name: str, phrase: str, file: str, train: Box, heldout: Box) -> Concept:
    return Concept(name, phrase, ("skimage", f"data/{file}"), train, heldout)


def _sklearn(name: str, phrase: str, file: str, train: Box, heldout: Box) -> Concept:
    return Concept(name, phrase, ("sklearn", f"datasets/images/{file}"), train, heldout)


CONCEPTS: tuple[Concept, ...] = (
    _skimage("cat", "a cat", "chelsea.png", (60, 0, 235, 300), (235, 0, 410, 300)),
    _skimage("coffee cup", "a coffee cup", "coffee.png", (100, 20, 300, 330), (300, 20, 500, 330)),
    _skimage("handwriting", "handwriting", "text.png", (0, 0, 230, 172), (230, 0, 448, 172)),
    _skimage("rocket", "a rocket", "rocket.jpg", (275, 120, 375, 265), (275, 265, 375, 410)),
    _skimage(
        "motorcycle",
        "a motorcycle",
        "motorcycle_left.png",
        (46, 100, 380, 480),
        (380, 60, 720, 480),
    ),
    _sklearn("pagoda", "a pagoda", "china.jpg", (100, 60, 215, 330), (215, 60, 330, 330)),
    _sklearn("flower", "a flower", "flower.jpg", (195, 60, 310, 310), (310, 60, 425, 310)),
    _skimage("coins", "some coins", "coins.png", (0, 0, 200, 303), (200, 0, 384, 303)),
    _skimage("brick wall", "a brick wall", "brick.png", (0, 0, 270, 512), (270, 0, 512, 512)),
    _skimage("grass", "grass", "grass.png", (0, 0, 270, 512), (270, 0, 512, 512)),
    _skimage("gravel", "gravel", "gravel.png", (0, 0, 270, 512), (270, 0, 512, 512)),
    _skimage("moon", "the moon", "moon.png", (0, 0, 512, 270), (0, 270, 512, 512)),
    _skimage(
        "galaxies", "galaxies", "hubble_deep_field.jpg", (0, 0, 540, 872), (540, 0, 1000, 872)
    ),
    _skimage("tissue", "tissue", "ihc.png", (0, 0, 270, 512), (270, 0, 512, 512)),
    _skimage("retina", "a retina", "retina.jpg", (150, 200, 705, 1200), (705, 200, 1260, 1200)),
    _skimage("page of text", "a page of text", "page.png", (0, 0, 200, 191), (200, 0, 384, 191)),
)

SPLITS = ("train", "heldout")
_CAPTIONS = {
    1: ("{0}", "a photo of {0}", "a close view of {0}", "here is {0}", "{0} in the picture"),
    2: ("{0} and {1}", "{0} next to {1}", "a picture of {0} beside {1}", "{0} with {1}"),
    3: ("{0}, {1} and {2}", "{0} next to {1} and {2}", "a collage of {0}, {1} and {2}"),
    4: ("{0}, {1}, {2} and {3}", "a collage of {0}, {1}, {2} and {3}"),
}


@dataclass(frozen=True)
class Scene:
    """One composed scene.

    Attributes:
        image: [h, w, 3] uint8 RGB.
        labels: [h, w] uint8, index into `CONCEPTS`.
        captions: each names a random subset of the scene's concepts.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    captions: list[str]


class MosaicScenes:
    """A fixed list of scenes; scene `i` depends on the seed, the split and `i` alone.

    Args:
        split: `train` or `heldout`.
        count: number of scenes.
        height: of a scene in pixels.
        width: of a scene in pixels.
        max_regions: a scene has two to this many regions, at most four.
        captions_per_scene: captions per scene.
        seed: another seed gives other scenes.

    Raises:
        DataError: unknown split, or the photographs are not installed.
    """

    def __init__(
        self,
        split: str = "train",
        count: int = 600,
        height: int = 224,
        width: int = 224,
        max_regions: int = 4,
        captions_per_scene: int = 5,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"mosaic split={split!r}; choose one of {', '.join(SPLITS)}")
        if not 2 <= max_regions <= 4:
            raise DataError(f"mosaic max_regions={max_regions}; choose 2, 3 or 4")
        self.split, self.count, self.height, self.width = split, count, height, width
        self.max_regions, self.captions_per_scene = max_regions, captions_per_scene
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        number = int(rng.integers(2, self.max_regions + 1))
        chosen = rng.choice(len(CONCEPTS), size=number, replace=False)
        image = np.empty((self.height, self.width, 3), np.uint8)
        labels = np.empty((self.height, self.width), np.uint8)
        for concept, (y0, x0, y1, x1) in zip(
            chosen, split_canvas(self.height, self.width, number, rng), strict=True
        ):
            image[y0:y1, x0:x1] = self._crop(int(concept), y1 - y0, x1 - x0, rng)
            labels[y0:y1, x0:x1] = concept
        return Scene(image, labels, self._captions(chosen, rng))

    def _crop(self, concept: int, height: int, width: int, rng: Generator) -> NDArray[np.uint8]:
        """A random crop of the concept's part, 60 to 100 % of the largest that fits."""
        part = self._parts[concept]
        scale = min(part.width / width, part.height / height) * rng.uniform(0.6, 1.0)
        w, h = max(1, int(width * scale)), max(1, int(height * scale))
        x = int(rng.integers(0, part.width - w + 1))
        y = int(rng.integers(0, part.height - h + 1))
        crop = part.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)

    def _captions(self, chosen: NDArray[np.int64], rng: Generator) -> list[str]:
        captions = []
        for _ in range(self.captions_per_scene):
            named = rng.permutation(chosen)[: rng.integers(1, len(chosen) + 1)]
            patterns = _CAPTIONS[len(named)]
            pattern = patterns[rng.integers(len(patterns))]
            captions.append(pattern.format(*(CONCEPTS[index].phrase for index in named)))
        return captions

    @cached_property
    def _parts(self) -> list[Image.Image]:
        boxes = [c.train if self.split == "train" else c.heldout for c in CONCEPTS]
        return [open_photo(c).crop(box) for c, box in zip(CONCEPTS, boxes, strict=True)]


def split_canvas(height: int, width: int, number: int, rng: Generator) -> list[Box]:
    """Cut a canvas into `number` rectangles (y0, x0, y1, x1), largest piece first, longer side."""
    pieces: list[Box] = [(0, 0, height, width)]
    while len(pieces) < number:
        pieces.sort(key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
        y0, x0, y1, x1 = pieces.pop()
        ratio = rng.uniform(0.35, 0.65)
        if x1 - x0 >= y1 - y0:
            cut = x0 + int((x1 - x0) * ratio)
            pieces += [(y0, x0, y1, cut), (y0, cut, y1, x1)]
        else:
            cut = y0 + int((y1 - y0) * ratio)
            pieces += [(y0, x0, cut, x1), (cut, x0, y1, x1)]
    return pieces


def open_photo(concept: Concept) -> Image.Image:
    """Open the whole photograph of a concept as RGB.

    Raises:
        DataError: the package that carries it is not installed.
    """
    package, file = concept.photo
    found = importlib.util.find_spec(package)
    path = Path(next(iter(found.submodule_search_locations or ("",)))) / file if found else None
    if path is None or not path.is_file():
        raise DataError(
            f"the photograph {file} of {package} is missing; "
            "install it with: pip install 'talk2dino[quickstart]'"
        )
    return Image.open(path).convert("RGB")


class Mosaic(Source):
    """Generated scenes of real photographs; see `talk2dino.datasets.mosaic`.

    Args:
        split: `train` or `heldout`.
        count: number of scenes.
        image_size: side of the square scenes in pixels.
        captions_per_scene: captions per scene.
        seed: another seed gives other scenes.
        limit: take only the first scenes.

    Raises:
        ConfigError: a count or size out of its range.
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
        check_number("source.image_size", image_size, 16, 8192)  # so that no piece is empty
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


@dataclass(kw_only=True)
class MosaicBenchmark(Benchmark):
    """Held-out mosaic scenes, see `talk2dino.datasets.mosaic`; label maps are exact.

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
