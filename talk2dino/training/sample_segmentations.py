"""A few pictures, segmented with the weights of the moment while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from talk2dino.alignment.module import AlignmentModule
from talk2dino.datasets.benchmarks.classes import folded, typed_classes
from talk2dino.datasets.label_files import header
from talk2dino.datasets.pictures import is_picture
from talk2dino.encoders.build import build_text, build_vision
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import ConfigError, DataError
from talk2dino.features import FeatureStore
from talk2dino.files import user_path
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation.overlay import save_picture
from talk2dino.segmentation.windows import SHORT_SIDE
from talk2dino.training.trackers import show_picture

FOLDER = "pictures"  # in the run folder


class SampleSegmentations(L.Callback):
    """Segments pictures after validations, with the weights that were validated, and at the end.

    The overlays become `pictures/{picture}-epoch{number}.png` in the run folder and go to the
    loggers. The encoders are those that the store names; they are built on first use.

    Args:
        folder: run folder.
        store: names the encoders.
        images: picture files, or a folder of them.
        classes: names to look for.
        every_n_epochs: epochs between two drawings; the last epoch is drawn in any case.
        short_side: working size in pixels.
        pamr: refine the edges.

    Raises:
        ConfigError: no classes, a value out of range, or a store without encoders.
        DataError: a picture is missing.
    """

    def __init__(
        self,
        folder: Path,
        store: FeatureStore,
        images: str | Sequence[str],
        classes: Sequence[str],
        every_n_epochs: int = 1,
        short_side: int = SHORT_SIDE,
        pamr: bool = False,
    ) -> None:
        key = "sample_segmentations"
        if not classes:
            raise ConfigError(f"{key}.classes: name what to look for: {key}.classes='[cat,sofa]'")
        self.classes = typed_classes(classes, f"{key}.classes")
        if every_n_epochs < 1:
            raise ConfigError(f"{key}.every_n_epochs={every_n_epochs}: use 1 or more")
        for kind in (store.vision, store.text):
            if kind is None or not kind.spec:
                raise ConfigError(
                    f"store={store.path}: does not name its encoders, which {key}.images needs"
                )
        self.folder, self.store = folder / FOLDER, store
        self.files = picture_files(images)
        self.every_n_epochs, self.short_side, self.pamr = every_n_epochs, short_side, pamr
        self._drawn = -1
        self._encoders: tuple[TimmVisionEncoder, TextEncoder] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw after every n-th epoch, before `AverageWeights` takes the average out again."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self._draw(trainer, module, trainer.current_epoch)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw the result, unless the last epoch has been drawn."""
        epoch = trainer.current_epoch - 1  # it counts finished epochs by now
        if epoch > self._drawn:
            self._draw(trainer, module, epoch)

    @rank_zero_only
    def _draw(self, trainer: L.Trainer, module: L.LightningModule, epoch: int) -> None:
        assert isinstance(module, AlignmentModule)
        self._drawn = epoch
        self.folder.mkdir(parents=True, exist_ok=True)
        model = self._with(module)
        for file in self.files:
            result = model.segment(file, self.classes, pamr=self.pamr, short_side=self.short_side)
            target = self.folder / f"{file.stem}-epoch{epoch:03d}.png"
            save_picture(result.overlay(), target)
            show_picture(trainer, f"segmentation/{file.stem}", target)

    def _with(self, module: AlignmentModule) -> Talk2DINO:
        """The whole model with a copy of the projection as it is now."""
        if self._encoders is None:
            assert self.store.vision is not None and self.store.text is not None
            vision = build_vision(self.store.vision.spec or {})
            self._encoders = vision, build_text(self.store.text.spec or {})
        return Talk2DINO(*self._encoders, deepcopy(module.projection)).to(module.device)


def picture_files(images: str | Sequence[str]) -> list[Path]:
    """The named files, or all pictures of a folder.

    Raises:
        DataError: missing, no picture, two of one name, or a folder without pictures.
    """
    named = [user_path(one) for one in ([images] if isinstance(images, str) else images)]
    files = named
    if len(named) == 1 and named[0].is_dir():
        files = sorted(path for path in named[0].iterdir() if is_picture(path))
    missing = next((path for path in files if not path.is_file()), None)
    if missing or not files:
        raise DataError(f"sample_segmentations.images={missing or named[0]}: no such picture")
    names = [folded(file.stem) for file in files]
    twice = next((f for f, name in zip(files, names, strict=True) if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"sample_segmentations.images={twice}: another picture has this name, by which the "
            "drawings are called; rename one"
        )
    for file in files:
        header(file)
    return files
