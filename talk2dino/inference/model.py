"""`Talk2DINO`: the whole model as one Python object."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.calibration.calibration import AUTO, FILE, find_calibration
from talk2dino.datasets.captions.base import crop_square
from talk2dino.datasets.pictures import ImageLike, as_list, to_picture, to_pixels
from talk2dino.encoders.build import build_vision
from talk2dino.encoders.devices import PRECISIONS, autocast, choose_device
from talk2dino.encoders.hub import WEIGHTS, upload_folder
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, check_number, say
from talk2dino.files import user_path
from talk2dino.inference.class_embeddings import Classes
from talk2dino.inference.model_card import read_results, refuse_foreign_card, write_card
from talk2dino.inference.segmented import SegmentedImage, background_threshold, refuse_background
from talk2dino.inference.text_side import TextSide
from talk2dino.inference.vocabulary import EncodedPicture, OpenVocabulary, say_equal
from talk2dino.segmentation.refinement.knn import KNN
from talk2dino.segmentation.refinement.pamr import PAMR
from talk2dino.segmentation.segmenter import EncodedImage, Segmenter
from talk2dino.segmentation.windows import SHORT_SIDE

DTYPES = {dtype or torch.float32: name for name, dtype in PRECISIONS.items()}


class Talk2DINO(TextSide):
    """A vision encoder, a text encoder, and the projection that connects them.

    Methods may be called from several threads: the encoders take turns, the rest shares nothing.

    Args:
        vision: frozen vision encoder.
        text: frozen text encoder, or the spec of one, which is built when it is first needed; None
            for class embeddings only.
        projection: trained on features of these two.
        dtype: arithmetic of the vision encoder, by autocast: float32, bfloat16 or float16. Text
            is encoded once per class, so it stays float32, as do projection and scores.

    Raises:
        CheckpointError: the projection's widths are not those of the encoders.
        ConfigError: another dtype.

    Examples:
        >>> import torch
        >>> from talk2dino import Talk2DINO
        >>> from talk2dino.alignment import ProjectionLayer
        >>> from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
        >>> vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
        >>> text = OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain")
        >>> model = Talk2DINO(vision, text, ProjectionLayer(text.embed_dim, vision.embed_dim))
        >>> model.encode_text(["a cat", "a sofa"]).shape
        torch.Size([2, 64])
        >>> image = torch.zeros(3, 40, 64, dtype=torch.uint8)
        >>> seg = model.segment(image, ["cat", "sofa"], short_side=32)
        >>> seg.classes, seg.labels.shape, seg.scores.shape
        (['cat', 'sofa'], torch.Size([40, 64]), torch.Size([2, 40, 64]))
    """

    def __init__(
        self,
        vision: TimmVisionEncoder,
        text: TextEncoder | Mapping[str, Any] | None,
        projection: Projection,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(vision, text, projection)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype}: choose one of {', '.join(map(str, DTYPES))}")
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        vision: TimmVisionEncoder | None = None,
        text: TextEncoder | Mapping[str, Any] | None = None,
        calibration: str | Path | None = AUTO,
    ) -> Talk2DINO:
        """Load from a folder, a checkpoint file of any format, or a Hub id.

        Only tensors and plain values are read; no code of a file or of the Hub is run.

        Args:
            location: a run folder or one of `save_pretrained`, a `.safetensors`, `.ckpt` or
                original `.pth` file, or a Hub id like `org/name` or `org/name@revision`; folder
                and Hub id may also be the original's, whose file holds both encoders, too.
            device: where to run; None takes the best there is.
            dtype: see the class.
            vision: needed for an original `.pth`, which does not name its encoders.
            text: likewise; an encoder or the spec of one. What the checkpoint names is built when
                it is first needed: never, if classes come as `ClassEmbeddings`.
            calibration: `auto` takes `calibration.safetensors` beside the checkpoint if there is
                one; None or `none` goes without; or a file.

        Raises:
            CheckpointError: nothing there, unreadable, or without encoders; a calibration of
                another model.
            ConfigError: a device that is not here.
        """
        checkpoint = read_checkpoint(location, whole=vision is None or text is None)
        where = checkpoint.path or location
        if vision is None:
            if checkpoint.vision is None:
                raise CheckpointError(
                    f"checkpoint={where}: does not name its vision encoder; say it with vision=…"
                )
            vision = build_vision(checkpoint.vision)
        vision.refuse_other_layers(checkpoint.vision, f"checkpoint={where}")
        if text is None:
            text = checkpoint.text
        model = cls(vision, text, checkpoint.projection, dtype)
        model.source = checkpoint.path
        model.calibration = find_calibration(calibration, location)
        if model.calibration is not None:
            model.calibration.check(vision, checkpoint.projection)
        return model.to(choose_device() if device is None else device)

    def save_pretrained(
        self, folder: str | Path, results: Sequence[str | Path | Mapping[str, Any]] = ()
    ) -> Path:
        """Write `projection.safetensors`, `config.json` and the model card `README.md`.

        A calibration goes with them.

        The weights file alone is enough to load the model: it names the encoders, which are not
        written. `config.json` says the same for people and for the Hub's counts.

        Args:
            folder: created when needed.
            results: measured numbers for the card: `results.json` files of evaluations, or their
                content; besides those that lie beside the checkpoint.

        Returns:
            The weights file.

        Raises:
            DataError: a results file that is none.
            ConfigError: no folder, or a file of these names there is somebody else's.
        """
        if not str(folder).strip() or user_path(folder).is_file():
            raise ConfigError(f"folder={str(folder)!r}: is no folder; name one, '.' for this one")
        path = user_path(folder) / WEIGHTS
        refuse_foreign_card(path.parent)
        measured = read_results(self.source, results)
        calibrated = {}
        if self.calibration is not None:
            self.calibration.check(self.vision, self.projection)
            self.calibration.save(path.with_name(FILE))
            calibrated = self.calibration.describe()
        text = self.text_spec or self.text.describe()["spec"]
        specs = {"vision": self.vision.spec, "text": dict(text)}
        save_projection(self.projection, path, specs)
        write_card(path.parent, self.projection, specs, self.source, measured, calibrated)
        return path

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        results: Sequence[str | Path | Mapping[str, Any]] = (),
        message: str = "Upload a Talk2DINO projection",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub, which needs a login.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the Hub refuses or does not answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, results)
            return upload_folder(Path(folder), repo_id, private, message)

    @torch.no_grad()
    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Patch tokens of one picture or several: `[B, P, D]` float32.

        Each picture is resized and center-cropped to the encoder's `image_size`, as in extraction.
        A projection with an image side is applied, so that the tokens compare with `encode_text`.

        Raises:
            DataError: not a picture, or an empty list.
        """
        batch: Sequence[Any] = as_list(images) or [images]
        size = self.vision.image_size
        pixels = torch.stack([crop_square(to_picture(to_pixels(i)), size) for i in batch])
        with self._turn, self._precision():
            tokens: Tensor = self.vision(pixels.to(self.device).float() / 255).patch_tokens
        return self.projection.project_visual(tokens.float())

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a sequence, too
        self, images: ImageLike, short_side: int | None = None
    ) -> EncodedPicture: ...
    @overload
    def encode(
        self, images: Sequence[ImageLike], short_side: int | None = None
    ) -> list[EncodedPicture]: ...
    def encode(
        self, images: ImageLike | Sequence[ImageLike], short_side: int | None = None
    ) -> EncodedPicture | list[EncodedPicture]:
        """Run the vision encoder only; the result goes into `segment` as often as one likes.

        Other classes, thresholds and refinements then need no encoder.

        Args:
            images: one picture, or several of any sizes, whose windows share batches.
            short_side: see `segment`.

        Raises:
            DataError: not a picture.
        """
        segmenter = self.segmenter(None, False, short_side)
        several = as_list(images)
        found = self._encode(segmenter, [images] if several is None else several)  # type: ignore[list-item]
        return found[0] if several is None else found

    @overload
    def segment(  # type: ignore[overload-overlap]  # a str is a sequence, too
        self,
        image: ImageLike | EncodedPicture,
        classes: Classes,
        background: bool | float | None = False,
        pamr: bool = False,
        short_side: int | None = None,
        templates: str | Sequence[str] | None = None,
        *,
        negatives: Sequence[str] = (),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        refinement: KNN | PAMR | str | None = AUTO,
    ) -> SegmentedImage: ...
    @overload
    def segment(
        self,
        image: Sequence[ImageLike] | Sequence[EncodedPicture],
        classes: Classes,
        background: bool | float | None = False,
        pamr: bool = False,
        short_side: int | None = None,
        templates: str | Sequence[str] | None = None,
        *,
        negatives: Sequence[str] = (),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        refinement: KNN | PAMR | str | None = AUTO,
    ) -> list[SegmentedImage]: ...
    def segment(
        self,
        image: ImageLike | EncodedPicture | Sequence[ImageLike] | Sequence[EncodedPicture],
        classes: Classes,
        background: bool | float | None = False,
        pamr: bool = False,
        short_side: int | None = None,
        templates: str | Sequence[str] | None = None,
        *,
        negatives: Sequence[str] = (),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        refinement: KNN | PAMR | str | None = AUTO,
    ) -> SegmentedImage | list[SegmentedImage]:
        """Segment a picture, or each of several, into named classes.

        Args:
            image: PIL image, path, bytes of a file, tensor `[3, H, W]` or array `[H, W, 3]` (uint8,
                or float in 0..1), an encoded picture, or a list of these.
            classes: names; a list inside the list is a name and its synonyms; or a mapping of a
                name to the words that stand for it. The best word counts. Exemplars among the
                words show the class, or stand alone in their place. `ClassEmbeddings`, or the
                `.safetensors` file of such, need no text encoder.
            background: True, or a threshold of the score, adds a background class in front and
                cleans the scores by the attention maps; True is 0.55.
            pamr: refine the edges.
            short_side: working size in pixels, rounded to whole patches; None takes 448.
            templates: a set of `encoders.text.prompts`, or sentences with `{}` for the name; None
                takes the set that suits the text encoder.
            negatives: words that are looked for and count as background where they win.
            prompts: by class name, whole sentences that replace its templates and synonyms.
            refinement: `KNN(…)` spreads scores between patches that look alike, before `pamr`;
                `PAMR(…)` is `pamr` with settings of its own; `auto` is `KNN()` with a calibration
                and None without.

        Raises:
            ConfigError: no class, or an argument out of its range.
            DataError: not a picture, or not a file of class embeddings.
            CheckpointError: class embeddings of another checkpoint.
        """
        vocabulary = self.open_vocabulary(
            classes,
            background,
            pamr,
            short_side,
            templates,
            negatives=negatives,
            prompts=prompts,
            refinement=refinement,
        )
        return vocabulary(image)

    def open_vocabulary(
        self,
        classes: Classes,
        background: bool | float | None = False,
        pamr: bool = False,
        short_side: int | None = None,
        templates: str | Sequence[str] | None = None,
        *,
        negatives: Sequence[str] = (),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        refinement: KNN | PAMR | str | None = AUTO,
    ) -> OpenVocabulary:
        """Settle the classes once, then call the result on the frames of a video or a folder.

        Arguments and errors as `segment`, which does the same for a single call. Warns
        (`ResultWarning`) of a single class with nothing to compare it with.
        """
        threshold = background_threshold(background, self.background)
        words, rows, offsets = self._rows(classes, templates, negatives, prompts, short_side)
        if threshold is not None or words.has_negatives:
            refuse_background(words.names)
        if len(words.names) == 1 and threshold is None and not words.has_negatives:
            say(
                f"classes: {words.names[0]!r} is alone, so every pixel becomes it, whatever is "
                "there; add a background, negatives or more classes to compare with",
                stacklevel=2,
            )
        say_equal(words.row_words, words.row_classes, rows)
        segmenter = self.segmenter(threshold, pamr, short_side, refinement)
        rows = self._calibrated(words, rows, offsets)
        return OpenVocabulary(words, rows, threshold, segmenter, partial(self._encode, segmenter))

    def segmenter(
        self,
        threshold: float | None,
        pamr: bool,
        short_side: int | None = None,
        refinement: KNN | PAMR | str | None = AUTO,
    ) -> Segmenter:
        """The sliding-window segmenter for whole pictures, with square windows of the working size.

        Raises:
            ConfigError: `short_side` is not positive, or another refinement.
        """
        if short_side is not None:
            check_number("short_side", short_side, 1, 8192)
        if pamr not in (True, False, None):
            raise ConfigError(f"pamr={pamr!r:.60}: give True or False")
        if refinement == AUTO:
            refinement = None if self.calibration is None else KNN()
        if not isinstance(refinement, KNN | PAMR | None):
            raise ConfigError(f"refinement={refinement!r}: give KNN(…), PAMR(…), None or {AUTO!r}")
        along_edges = PAMR() if pamr else None
        if isinstance(refinement, PAMR):
            along_edges, refinement = refinement, None
        patch = self.vision.patch_size
        side = max(patch, round((short_side or SHORT_SIDE) / patch) * patch)
        return Segmenter(
            self.vision,
            window=side,
            stride=max(1, side // 2),
            short_side=side,
            input_size=side,
            background_cleaning=threshold is not None,
            background_threshold=threshold,
            pamr=along_edges,
            knn=refinement,
            project_patches=visual_side(self.projection),
        )

    def _look(self, image: ImageLike, short_side: int | None) -> EncodedImage:
        return self.encode(image, short_side).windows

    def _encode(self, segmenter: Segmenter, images: Sequence[ImageLike]) -> list[EncodedPicture]:
        pixels = [to_pixels(image) for image in images]
        with self._turn, self._precision():
            windows = segmenter.encode_batch([one.to(self.device) for one in pixels])
        return [EncodedPicture(*pair) for pair in zip(pixels, windows, strict=True)]

    def _precision(self) -> AbstractContextManager[Any]:
        return autocast(DTYPES[self.dtype], self.device)
