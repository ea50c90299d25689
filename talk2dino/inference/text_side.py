"""The text side of the model: an encoder that is built when it is first needed, ψ, class rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from talk2dino.alignment.class_names import embed_prompts, embed_texts
from talk2dino.alignment.projection import Projection, projection_state, visual_side
from talk2dino.calibration.calibration import Calibration
from talk2dino.calibration.reference import require_encoder
from talk2dino.calibration.shown_classes import Seen, Spread, class_rows, see
from talk2dino.datasets.benchmarks.base import Protocol
from talk2dino.datasets.pictures import ImageLike
from talk2dino.encoders.build import build_text, check_spec
from talk2dino.encoders.devices import devices_here
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import Advance, CheckpointError, ConfigError, say
from talk2dino.features.store.reader import FeatureStore
from talk2dino.finding.scan import (
    BEST,
    PATCHES,
    Found,
    Scan,
    check_search,
    found_pictures,
    searched_field,
)
from talk2dino.inference.class_embeddings import (
    CALIBRATION,
    ClassEmbeddings,
    Classes,
    describe_model,
    is_file,
)
from talk2dino.inference.exemplars import Exemplar, mix, say_confused
from talk2dino.inference.segmented import BACKGROUND_SCORE
from talk2dino.inference.vocabulary import (
    Sentences,
    TextCache,
    Words,
    exemplars_of,
    named_groups,
    read_words,
    say_equal,
)
from talk2dino.segmentation.scores import with_offsets
from talk2dino.segmentation.segmenter import EncodedImage

EncoderT = TypeVar("EncoderT")
SideT = TypeVar("SideT", bound="TextSide")


class TextSide(nn.Module):
    """What `Talk2DINO` does with words; it adds the pictures.

    Args:
        vision: vision encoder, which class embeddings name.
        text: text encoder, the spec of one, or None for class embeddings only.
        projection: ψ.

    Raises:
        CheckpointError: the projection's widths are not those of the encoders, or a spec of
            another class than this package's own encoders.
    """

    dtype: torch.dtype

    def __init__(
        self,
        vision: TimmVisionEncoder,
        text: TextEncoder | Mapping[str, Any] | None,
        projection: Projection,
    ) -> None:
        super().__init__()
        self.vision = fitting("vision", vision, projection.vision_dim)
        self.source: Path | None = None  # the file that from_pretrained read
        self.calibration: Calibration | None = None
        self._text: TextEncoder | None = None
        self._text_spec: Mapping[str, Any] | None = None
        if isinstance(text, Mapping):
            check_spec(text, "text")
            self._text_spec = text
        elif text is not None:
            self._text = fitting("text", text, projection.text_dim)
        self.projection = projection.eval()
        self._cache = TextCache()
        self._looked = TextCache(32)  # at exemplars; 258 rows each
        self._turn = RLock()  # hooks that read the attention belong to one forward pass at a time

    @property
    def text(self) -> TextEncoder:
        """The text encoder, built now if it was not yet.

        Raises:
            EncoderError: its weights or its package are not available.
            CheckpointError: its width is not the projection's, or the checkpoint names none.
        """
        with self._turn:
            if self._text is None:
                if self._text_spec is None:
                    raise CheckpointError(
                        f"checkpoint={self.source}: does not name its text encoder; say it with "
                        "text=…"
                    )
                built: Any = build_text(self._text_spec)
                self._text = fitting("text", built.to(self.device), self.projection.text_dim)
            return self._text

    @property
    def text_spec(self) -> Mapping[str, Any] | None:
        """The config node of the text encoder, which is not built for it; None if none is named."""
        if self._text_spec is None and self._text is not None:
            self._text_spec = dict(self._text.describe()["spec"])
        return self._text_spec

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.projection.parameters()).device

    def to(self: SideT, *args: Any, **kwargs: Any) -> SideT:
        """As PyTorch's `Module.to`.

        Raises:
            ConfigError: a device that is not here.
        """
        try:
            return super().to(*args, **kwargs)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].partition(" http")[0]
            device, here = kwargs.get("device", *args[:1]), ", ".join(devices_here())
            raise ConfigError(
                f"device={device!r}: not usable ({reason}); here are {here}"
            ) from error

    @property
    def background(self) -> float:
        """Score of the background in `segment` where none is named: a calibration's, or 0.55."""
        if self.calibration is None:
            return BACKGROUND_SCORE
        chosen = self.calibration.background_score(True, Protocol.lambda_bg)
        return BACKGROUND_SCORE if chosen is None else chosen

    @property
    def _compared_with(self) -> str:
        return "" if self.calibration is None else self.calibration.digest

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """ψ of texts, `[N, D]` float32, not normalized; a single text is a list of one."""
        texts = [texts] if isinstance(texts, str) else texts
        with self._turn:
            embeddings = embed_texts(texts, self.text, self.projection)
        return self.projection.project_embedding(embeddings)

    def embed_classes(
        self,
        classes: Classes,
        templates: str | Sequence[str] | None = None,
        *,
        negatives: Sequence[str] = (),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        short_side: int | None = None,
    ) -> ClassEmbeddings:
        """Classes with their vectors: `segment` takes them, or the file that their `save` writes.

        Arguments and errors as `Talk2DINO.segment`; given class embeddings come back checked.
        """
        given = ClassEmbeddings.of(classes)
        if given is None:
            words, rows, offsets = self._rows(classes, templates, negatives, prompts, short_side)
            say_equal(words.row_words, words.row_classes, rows)
            texts, used = None, templates or ""
            if any(words.rows):
                with self._turn:
                    texts, used = self.text.describe(), templates or self.text.templates
            made_with = describe_model(self.vision.describe(), texts, self.projection)
            used = used if isinstance(used, str) else list(used)
            named: Any = classes
            shown = {k: tuple(e.digest for e in v) for k, v in exemplars_of(named).items()}
            made_with |= {CALIBRATION: self._compared_with} if shown else {}
            offsets = None if offsets is None else offsets.cpu()
            return ClassEmbeddings(words, rows.cpu(), used, made_with, shown, offsets=offsets)
        given.refuse_words(templates, negatives, prompts)
        return given.check(self.vision, self.text_spec, self.projection, self._compared_with)

    def search(
        self,
        store: FeatureStore | str | Path,
        queries: Classes,
        top: int = 10,
        best: int = BEST,
        templates: str | Sequence[str] | None = None,
        *,
        advance: Advance = lambda done, total: None,
    ) -> Iterator[Found]:
        """The pictures of a feature store in which words are found, the best first.

        The store is read once for all queries, when the first result is asked for.

        Args:
            store: features of this model's vision encoder, or their folder. Without patch tokens,
                the pooled ones are compared and results have no place.
            queries: a text, or as the classes of `segment`: several, with synonyms, or class
                embeddings.
            top: pictures of each query.
            best: patches of a picture whose mean score counts.
            templates: see `segment`.
            advance: gets (pictures compared, all).

        Returns:
            Results one by one, query after query.

        Raises:
            ConfigError: no query, or a count out of its range.
            StoreError: no such store, or one without such features, or damaged ones.
            CheckpointError: a store of another vision encoder.
        """
        check_search(top, best)
        opened = store if isinstance(store, FeatureStore) else FeatureStore(store)
        searched = searched_field(opened)
        require_encoder(opened, self.vision, "extract with that")
        given = [queries] if isinstance(queries, str) and not is_file(queries) else queries
        words, rows, offsets = self._rows(given, templates, (), None)
        if words.has_negatives:
            raise ConfigError("query: these class embeddings hold negatives, which nothing is")
        if searched == PATCHES:  # a calibration is made of patches
            rows = self._calibrated(words, rows, offsets)
        scan = Scan(opened, rows, torch.tensor(words.row_classes), self.projection)
        return found_pictures(scan, words.names, top, best, advance)

    def embed_exemplars(
        self, exemplars: Exemplar | Sequence[Exemplar], short_side: int | None = None
    ) -> Tensor:
        """The row of a class that these show, `[D]` of unit length, see `shown_classes.class_rows`.

        Rows of earlier calls are not computed again.

        Args:
            exemplars: one or several.
            short_side: working size in pixels, as for `segment`.

        Raises:
            DataError: an exemplar that cannot be read, has an empty mask or one of another size,
                or does not differ from all else.
            ConfigError: none, or something else.
        """
        exemplars = [exemplars] if isinstance(exemplars, Exemplar) else exemplars
        listed = isinstance(exemplars, Sequence) and len(exemplars) > 0
        if not listed or not all(isinstance(one, Exemplar) for one in exemplars):
            given = type(exemplars).__name__
            raise ConfigError(f"exemplars={given}: give at least one Exemplar(image, mask)")
        return self.shown_rows([exemplars], short_side)[0][0]

    @torch.no_grad()
    def shown_rows(
        self,
        classes: Sequence[Sequence[Exemplar]],
        short_side: int | None = None,
        advance: Advance = lambda done, total: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of classes that are shown and, without a calibration, the mean patch of them all.

        Arguments and errors as `embed_exemplars`, results as `shown_classes.class_rows`. With a
        calibration a row does not depend on the other classes.

        Args:
            classes: the exemplars of each.
            short_side: working size in pixels, as for `segment`.
            advance: gets (exemplars looked at, all).
        """
        if not classes:
            return torch.empty(0), None
        psi, calibration = self.projection, self.calibration
        state = (self.vision, short_side, self.dtype, *projection_state(psi))
        order = {id(one): n for n, one in enumerate(one for each in classes for one in each)}

        def looked(exemplar: Exemplar) -> Seen:
            def look(_: object) -> Tensor:
                pixels, inside = exemplar.read()
                return see(self._look(pixels, short_side), inside, visual_side(psi)).packed[None]

            seen = Seen.unpacked(self._looked.get([(exemplar.digest,)], state, look)[0])
            advance(order[id(exemplar)] + 1, len(order))
            return seen

        def rows(group: Sequence[Sequence[Exemplar]]) -> Tensor:
            seen = [[looked(one) for one in exemplars] for exemplars in group]
            known = None if calibration is None else calibration.reference(psi, self.device)
            made, mean = class_rows(seen, None if known is None else Spread.of(known.tokens))
            return made if mean is None else torch.cat([made, mean[None]])

        found = []
        for group in [classes] if calibration is None else [[one] for one in classes]:
            key = tuple(",".join(one.digest for one in exemplars) for exemplars in group)
            kind = (self._compared_with, *state)
            row = self._cache.rows.get((kind, key))
            row = rows(group) if row is None else row  # unlocked: other callers' words do not wait
            found.append(self._cache.get([key], kind, lambda _: row[None])[0])  # noqa: B023
        every = torch.cat(found)
        return every[: len(classes)], every[-1] if calibration is None else None

    def _look(self, image: ImageLike, short_side: int | None) -> EncodedImage:
        raise NotImplementedError  # `Talk2DINO` encodes the windows of a picture

    def _rows(
        self,
        classes: Classes,
        templates: str | Sequence[str] | None,
        negatives: Sequence[str],
        prompts: Mapping[str, str | Sequence[str]] | None,
        short_side: int | None = None,
    ) -> tuple[Words, Tensor, Tensor | None]:
        """Words, their unit rows `[N, D]`, and offsets `[N]` where there is no calibration."""
        given = ClassEmbeddings.of(classes)
        if given is not None:
            kept = self.embed_classes(given, templates, negatives=negatives, prompts=prompts)
            own = kept.offsets
            return (
                kept.words,
                kept.rows.to(self.device),
                own if own is None else own.to(self.device),
            )
        if templates is not None and not templates:
            raise ConfigError(f"templates={templates!r}: give sentences with {{}} for the name")
        named: Any = classes
        words = read_words(named, negatives, prompts, templates or "plain")
        if any(words.rows) and not templates:  # only words need a text encoder
            words = read_words(named, negatives, prompts, self.text.templates)
        said = iter(self._embed([sentences for sentences in words.rows if sentences]))
        shown = exemplars_of(named)
        say_confused(named_groups(named))
        if shown and self.calibration is None and not all(name in shown for name in words.names):
            say(
                "classes: some are shown and some are said, and this checkpoint has no "
                "calibration; what few pictures show alone hardly ever wins against words: give it "
                "its word, too, or show more of it",
                stacklevel=3,
            )
        made, mean = self.shown_rows(list(shown.values()), short_side)
        seen = dict(zip(shown, made, strict=True))
        rows = []
        for name, sentences in zip(words.row_names, words.rows, strict=True):
            if not sentences:
                rows.append(seen[str(name)])
            elif name in shown:
                rows.append(mix(next(said), seen[name], shown[name]))
            else:
                rows.append(next(said))
        found = torch.stack(rows)
        share = 1 - any(words.rows) / max(1, sum(map(len, shown.values())))  # docs/exemplars.md
        return words, found, None if mean is None else share * (found @ mean)

    def _calibrated(self, words: Words, rows: Tensor, offsets: Tensor | None) -> Tensor:
        """Rows `[N, D]` as the segmenter takes them: with offsets, a calibration's or their own."""
        if self.calibration is not None:
            return self.calibration.score_rows(rows, words.row_names, self.projection)
        return rows if offsets is None else with_offsets(rows, offsets)

    def _embed(self, rows: Sequence[Sentences]) -> Tensor:
        """`[N, D]` unit rows; those of earlier calls are not computed again."""
        if not rows:
            return torch.empty(0)

        def compute(new: Sequence[Sentences]) -> Tensor:
            with self._turn:
                return embed_prompts(new, self.text, self.projection)

        return self._cache.get(rows, projection_state(self.projection), compute)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a lock cannot travel."""
        return {key: value for key, value in self.__dict__.items() if key != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._turn = RLock()


def fitting(key: str, encoder: EncoderT, wanted: int) -> EncoderT:
    """The encoder, if its width is that of the projection."""
    width = getattr(encoder, "embed_dim", None)
    if width != wanted:
        raise CheckpointError(
            f"the checkpoint was trained for a {key} encoder of width {wanted}, but "
            f"{getattr(encoder, 'name', key)} has {width}; choose its encoder with {key}=…"
        )
    return encoder
