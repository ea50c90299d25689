"""The files that an evaluation writes image by image, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from talk2dino.errors import ConfigError
from talk2dino.segmentation.benchmarks import Sample
from talk2dino.segmentation.overlay import Colour, class_colours, overlay, save_label_map
from talk2dino.segmentation.report import panel, save_picture


@dataclass(frozen=True)
class ImageFiles:
    """Which files an image leaves behind.

    Attributes:
        folder: of the run; files go to `pictures`, `label_maps` and `overlays` in it.
        names: of the K classes.
        ignore_index: label value that does not count.
        pictures: the first so many images get a sheet of image, truth and prediction.
        label_maps: every image gets its label map, an indexed PNG of class indices, and an overlay.
        palette: the dataset's colours for the label maps; None takes those of the overlays.

    Raises:
        ConfigError: label maps of more than 256 classes, which a PNG palette cannot hold.
    """

    folder: Path
    names: Sequence[str]
    ignore_index: int = 255
    pictures: int = 0
    label_maps: bool = False
    palette: Sequence[Colour] | None = None

    def __post_init__(self) -> None:
        if self.label_maps and len(self.names) > 256:
            raise ConfigError(
                f"label_maps=true: {len(self.names)} classes do not fit the 256 values of an "
                "indexed PNG; use label_maps=false"
            )

    def paths(self, index: int, name: str) -> list[Path]:
        """Files that image `index` has when it is finished."""
        return list(self._places(index, name).values())

    def _places(self, index: int, name: str) -> dict[str, Path]:
        wanted = {
            "pictures": index < self.pictures,
            "label_maps": self.label_maps,
            "overlays": self.label_maps,
        }
        kinds = [kind for kind, wished in wanted.items() if wished]
        return {kind: self.folder / kind / f"{name}.png" for kind in kinds}

    def write(self, index: int, sample: Sample, labels: Tensor) -> None:
        """Write the image's files; each appears complete or not at all."""
        places = self._places(index, sample.name)
        labels = labels.cpu() if places else labels
        for kind, path in places.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "label_maps":
                save_label_map(labels, path, self.palette or class_colours(self.names))
            elif kind == "overlays":
                save_picture(overlay(pixels(sample), labels, self.names), path)
            else:
                save_picture(panel(sample, labels, self.names, self.ignore_index), path)


def pixels(sample: Sample) -> Image.Image:
    """The picture of a sample."""
    return Image.fromarray(sample.image.cpu().permute(1, 2, 0).contiguous().numpy())
