"""`Calibration`: what makes the scores of different words comparable, and its file.

A safetensors file with `tokens` `[R, D]` and `vocabulary` `[V, D]`, both float16, if captions are
known `unmentioned` `[V, R]` bool, and as metadata a JSON entry `talk2dino_calibration`:

| key | value |
| --- | --- |
| `version` | 1 |
| `rule` | `_target_` and arguments of one of `rules.RULES` |
| `background` | `threshold`, the background's score, and `lowest`, see `Background` |
| `class_offsets` | what is subtracted besides, by class name |
| `made_with` | `vision` and `projection`: `spec` and `weights_sha256` each |
| `facts` | where the patches come from, and what was measured |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talk2dino.alignment.checkpoint import has_entry, identify_projection
from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.calibration.background_threshold import Background, choose_background
from talk2dino.calibration.rules import Reference, Rule, build_rule, describe_rule
from talk2dino.datasets.benchmarks.classes import composed
from talk2dino.encoders.hub import hub_file, split_hub_id
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import CheckpointError, ConfigError
from talk2dino.files import refuse_foreign, replacing, user_path
from talk2dino.segmentation.scores import class_scores, with_offsets

FILE = "calibration.safetensors"
KEY = "talk2dino_calibration"
VERSION = 1
AUTO, OFF = "auto", "none"
ROWS = 256  # compared with the reference at once: 4 MB for 4096 patches
_HOW = "make it with: python -m talk2dino.calibrate checkpoint=… store=… (or images=…)"


@dataclass(frozen=True, eq=False)
class Calibration:
    """A reference of patch tokens, a rule, and what was chosen with them for one projection.

    Attributes:
        tokens: `[R, D]` float16 patch tokens as the vision encoder gave them.
        vocabulary: `[V, D]` float16 unit rows of common words.
        rule: gives every text row its offset.
        made_with: spec and digest of `vision` and `projection`.
        background: what the background scores, or None if nothing was chosen.
        class_offsets: what is subtracted besides from all rows of a class, by its name.
        facts: plain values about where it comes from.
        origin: the file.
        unmentioned: `[V, R]` bool, whether no caption of the token's picture speaks of the word;
            None where captions are not known or the rule reads none.
    """

    tokens: Tensor = field(repr=False)
    vocabulary: Tensor = field(repr=False)
    rule: Rule
    made_with: Mapping[str, Any] = field(repr=False)
    background: Background | None = None
    class_offsets: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "Calibration"
    unmentioned: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        vocabulary: Tensor,
        rule: Rule,
        vision: TimmVisionEncoder,
        projection: Projection,
        facts: Mapping[str, Any] = {},
        unmentioned: Tensor | None = None,
    ) -> Calibration:
        """A calibration of a model, still without a background.

        Args:
            tokens: `[R, D]` patch tokens of `vision`.
            vocabulary: `[V, D]` unit rows of `projection`.
            rule: gives every row its offset.
            vision: the model's encoder.
            projection: the model's ψ.
            facts: plain values to keep.
            unmentioned: `[V, R]` bool, see `mentions.unmentioned`.
        """
        described = vision.describe()
        kept = {key: described[key] for key in ("spec", "weights_sha256")}
        made_with = {"vision": kept, "projection": identify_projection(projection)}
        halves = tokens.cpu().half(), vocabulary.cpu().half()
        return cls(*halves, rule, made_with, facts=facts, unmentioned=unmentioned)

    @torch.no_grad()
    def apply(self, rows: Tensor, projection: Projection | None = None) -> tuple[Tensor, Tensor]:
        """What the rule makes of text rows; every row by itself.

        Args:
            rows: `[N, D]` of unit length.
            projection: whose image side the reference passes first, if it has one.

        Returns:
            Rows `[N, D]` and offsets `[N]` float32: a patch scores `row · token - offset`.
        """
        reference = self.reference(projection, rows.device)
        parts = [self.rule(part, reference) for part in torch.split(rows.float(), ROWS)]
        calibrated, offsets = (torch.cat(values) for values in zip(*parts, strict=True))
        return calibrated, offsets

    def score_rows(
        self, rows: Tensor, names: Sequence[str | None], projection: Projection | None = None
    ) -> Tensor:
        """Text rows as the segmenter takes them: `[N, D + 1]`, the offset in the last column.

        Args:
            rows: `[N, D]` of unit length.
            names: the class of every row, which may have an offset of its own; None for none.
            projection: see `apply`.
        """
        calibrated, offsets = self.apply(rows, projection)
        fitted = {composed(name): offset for name, offset in self.class_offsets.items()}
        own = [fitted.get(composed(name), 0.0) if name else 0.0 for name in names]
        return with_offsets(calibrated, offsets + torch.tensor(own).to(offsets))

    def reference(
        self, projection: Projection | None = None, device: torch.device | None = None
    ) -> Reference:
        """Tokens and words of unit length, in the space that `projection` compares in."""
        tokens = self.tokens.to(device).float()
        side = None if projection is None else visual_side(projection)
        if side is not None:
            tokens = side(tokens)
        tokens = F.normalize(tokens, dim=-1, eps=1e-6)
        vocabulary = F.normalize(self.vocabulary.to(device).float(), dim=-1, eps=1e-6)
        if self.unmentioned is None:
            return Reference(tokens, vocabulary)
        counted = self.unmentioned.to(tokens)
        return Reference(tokens, vocabulary, counted @ tokens / counted.sum(1, keepdim=True))

    @torch.no_grad()
    def with_background(self, projection: Projection) -> Calibration:
        """The same with the score of the background that fits it, see `choose_background`."""
        reference = self.reference(projection)
        calibrated = with_offsets(*self.apply(reference.vocabulary, projection))
        grid = (1, len(reference.tokens))
        scores = class_scores(reference.tokens[None], calibrated, grid)[0, :, 0]  # [V, R]
        return replace(self, background=choose_background(scores))

    def background_score(self, cleaning: bool, weight: float) -> float | None:
        """Score of the background, with `lambda_bg` as the weight if scores are cleaned."""
        if self.background is None:
            return None
        return self.background.after_cleaning(weight) if cleaning else self.background.threshold

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides a score, hex; records and results name it."""
        entry = self._entry()
        entry.pop("facts")
        found = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
        for part in self._tensors().values():
            found.update(part.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values for results and cards: rule, background, classes with offsets, digest."""
        rule = describe_rule(self.rule)
        name = str(rule.pop("_target_")).rpartition(".")[2]
        return {
            "rule": name,
            **rule,
            "tokens": len(self.tokens),
            "captions": self.unmentioned is not None,
            "background": self.background and self.background.threshold,
            "class_offsets": len(self.class_offsets),
            "sha256": self.digest,
        }

    def check(self, vision: TimmVisionEncoder, projection: Projection) -> None:
        """Refuse a model with another vision encoder or another projection (CheckpointError)."""
        made = self.made_with["vision"]
        wrong = ""
        if made["weights_sha256"] != state_dict_digest(vision.model):
            wrong = f"vision encoder ({made['spec'].get('name')}, not {vision.name})"
        elif self.made_with["projection"] != identify_projection(projection):
            wrong = "projection"
        if wrong:
            raise CheckpointError(
                f"calibration={self.origin}: made with another {wrong} than this checkpoint has; "
                "calibrate it again, or go without: calibration=none"
            )
        vision.refuse_other_layers(made["spec"], f"calibration={self.origin}")

    def save(self, path: str | Path) -> Path:
        """Write the file, complete or not at all; only an earlier calibration is replaced.

        Raises:
            ConfigError: another file has that name, or the name ends otherwise.
        """
        target = check_writable(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {name: part.cpu().contiguous() for name, part in self._tensors().items()}
        with replacing(target) as temporary:
            save_file(content, temporary, {KEY: json.dumps(self._entry())})
        return target

    def _tensors(self) -> dict[str, Tensor]:
        found = {"tokens": self.tokens, "vocabulary": self.vocabulary}
        return found if self.unmentioned is None else found | {"unmentioned": self.unmentioned}

    def _entry(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "rule": describe_rule(self.rule),
            "background": self.background and asdict(self.background),
            "class_offsets": dict(self.class_offsets),
            "made_with": dict(self.made_with),
            "facts": dict(self.facts),
        }

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file of `save`; nothing in it is run.

        Raises:
            CheckpointError: no such file, or not one of a calibration.
        """
        where, file = f"calibration={path}", user_path(path)
        if not file.is_file():
            raise CheckpointError(f"{where}: no such file; {_HOW}")
        try:
            with safe_open(file, framework="pt") as opened:
                entry = (opened.metadata() or {}).get(KEY)
                known = {"tokens", "vocabulary", "unmentioned"} & set(opened.keys())
                parts = {name: opened.get_tensor(name) for name in known}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{where}: not a safetensors file ({error}); {_HOW}") from error
        if entry is None:
            raise CheckpointError(f"{where}: holds no calibration (no {KEY} entry); {_HOW}")
        try:
            content = json.loads(entry)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, known is {VERSION}")
            made_with = {
                part: dict(content["made_with"][part]) for part in ("vision", "projection")
            }
            made_with["vision"]["spec"].get("name"), made_with["vision"]["weights_sha256"]
            chosen = content["background"]
            background = None if chosen is None else Background(**chosen)
            for name in ("tokens", "vocabulary"):
                if parts[name].ndim != 2 or not len(parts[name]) or parts[name].isnan().any():
                    raise ValueError(f"{name} {list(parts[name].shape)}")
            said = parts.get("unmentioned")
            if said is not None:
                shape = [len(parts["vocabulary"]), len(parts["tokens"])]
                if said.dtype != torch.bool or list(said.shape) != shape or not said.any(1).all():
                    raise ValueError(f"unmentioned {said.dtype} {list(said.shape)}")
            return cls(
                parts["tokens"],
                parts["vocabulary"],
                build_rule(content["rule"], where),
                made_with,
                background,
                {str(name): float(value) for name, value in content["class_offsets"].items()},
                dict(content["facts"]),
                str(path),
                said,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ConfigError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else e
            raise CheckpointError(f"{where}: damaged ({reason}); {_HOW}") from e


def check_writable(path: str | Path) -> Path:
    """Where a calibration may be written.

    Raises:
        ConfigError: somebody else's file has that name, or the name ends otherwise.
    """
    target = user_path(path)
    if target.suffix != ".safetensors":
        raise ConfigError(f"output={path}: the name must end in .safetensors")
    refuse_foreign([target], _is_ours, "talk2dino.calibrate", None)
    return target


def _is_ours(path: Path) -> bool:
    return has_entry(path, KEY)


def beside(location: str | Path) -> Path | None:
    """Where the calibration of a local checkpoint belongs; None for a Hub id."""
    path = user_path(location)
    if path.is_dir():
        return path / FILE
    return path.parent / FILE if path.is_file() else None


def find_calibration(setting: str | Path | None, location: str | Path) -> Calibration | None:
    """The calibration that the key `calibration` means.

    Args:
        setting: `auto` takes the one beside the checkpoint if there is one; None or `none` none;
            else a file.
        location: of the checkpoint, as it was given.

    Raises:
        CheckpointError: no such file, or not a calibration.
    """
    if setting is None or str(setting).lower() == OFF:
        return None
    if setting != AUTO:
        return Calibration.load(setting)
    file = beside(location)
    if file is not None:
        return Calibration.load(file) if file.exists() else None
    named = split_hub_id(str(location))
    if named is None:
        return None
    try:
        return Calibration.load(hub_file(named[0], FILE, named[1]))
    except FileNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={location}: the Hub does not say whether it has a {FILE} "
            f"({type(error).__name__}); try again, or go without: calibration=none"
        ) from error
