"""Rules of calibration: from text rows and a reference to rows and what is subtracted from them.

A rule sees one row at a time, so that a word gets the same offset whatever its company. A file may
name the rules of `RULES` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from talk2dino.errors import CheckpointError, ConfigError, check_number
from talk2dino.renamed import TARGET, current

NEAR = 0.05  # temperature over words: a row with a cosine of 1 with one of them hears that alone


@dataclass(frozen=True, eq=False)
class Reference:
    """What a rule compares rows with.

    Attributes:
        tokens: `[R, D]` float32 unit patch tokens of unlabeled pictures.
        vocabulary: `[V, D]` float32 unit rows of common words.
        means: `[V, D]` float32, for each of these words the mean of the tokens of pictures whose
            captions do not speak of it; None where captions are not known.
    """

    tokens: Tensor = field(repr=False)
    vocabulary: Tensor = field(repr=False)
    means: Tensor | None = field(default=None, repr=False)


class Rule(Protocol):
    """Gives rows their offsets: the score of a patch is `row · token - offset`.

    Attributes:
        reads_captions: whether it looks at `Reference.means`.
    """

    reads_captions: ClassVar[bool]

    def __call__(self, rows: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """`[N, D]` unit rows to rows `[N, D]` and offsets `[N]`."""


@dataclass(frozen=True)
class QuantileOffset:
    """Subtract a share of the cosine that a row reaches on few of the reference patches.

    Words differ in how alike they are to patches of any kind; what a word scores at its best on
    pictures in general says little about this one.

    Args:
        share: of the quantile that is subtracted, 0..1; 0 changes nothing.
        quantile: 0..1; 0.95 is the cosine that one patch of twenty exceeds. Between two patches it
            is interpolated linearly.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> import torch
        >>> from talk2dino.calibration.rules import QuantileOffset, Reference
        >>> tokens = torch.nn.functional.normalize(torch.tensor([[3.0, 4.0], [4.0, 3.0], [0, 1]]))
        >>> rows = torch.eye(2)
        >>> QuantileOffset(share=0.5, quantile=0.5)(rows, Reference(tokens, rows))[1]
        tensor([0.3000, 0.4000])
    """

    reads_captions: ClassVar[bool] = False
    share: float = 0.5
    quantile: float = 0.95

    def __post_init__(self) -> None:
        for name in ("share", "quantile"):
            check_number(f"rule.{name}", getattr(self, name), 0.0, 1.0)

    def __call__(self, rows: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return rows, self.share * upper_quantile(rows @ reference.tokens.t(), self.quantile)


@dataclass(frozen=True)
class MeanOffset:
    """Subtract a share of what a row scores on the reference on average.

    The same as comparing with patch tokens from which a share of their mean is taken: what all
    patches have in common says nothing about one of them, and words differ in how alike they are
    to it. A rule of this project, measured in docs/calibration.md.

    Args:
        share: of the mean cosine that is subtracted, 0..1; 0 changes nothing.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> import torch
        >>> from talk2dino.calibration.rules import MeanOffset, Reference
        >>> tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
        >>> rows = torch.eye(2)
        >>> MeanOffset()(rows, Reference(tokens, rows))[1]
        tensor([0.6000, 0.6000])
    """

    reads_captions: ClassVar[bool] = False
    share: float = 1.0

    def __post_init__(self) -> None:
        check_number("rule.share", self.share, 0.0, 1.0)

    def __call__(self, rows: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return rows, self.share * (rows @ reference.tokens.mean(dim=0))


@dataclass(frozen=True)
class UnmentionedOffset:
    """Subtract what a row scores on average on pictures whose captions do not speak of it.

    `MeanOffset` takes most from what is often shown: people are in many pictures, so "person"
    scores high on average, and loses its pixels to words that nobody says. A score on pictures
    that do not have the thing is what all patches have in common. Which captions speak of what is
    known for the words of the vocabulary; a row takes the means of those that are most like it, by
    a softmax over cosines. Without captions it is `MeanOffset`. A rule of this project, measured in
    docs/calibration.md.

    Args:
        share: of that mean that is subtracted, 0..1; 0 changes nothing.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> import torch
        >>> from talk2dino.calibration.rules import Reference, UnmentionedOffset
        >>> tokens = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # of two pictures
        >>> means = tokens.flip(0)  # each has one of two words, so the other picture is left
        >>> rows = torch.eye(2)
        >>> UnmentionedOffset()(rows, Reference(tokens, rows, means))[1].round(decimals=4)
        tensor([0.6000, 0.0000])
        >>> UnmentionedOffset()(rows, Reference(tokens, rows))[1]
        tensor([0.8000, 0.4000])
    """

    reads_captions: ClassVar[bool] = True
    share: float = 1.0

    def __post_init__(self) -> None:
        check_number("rule.share", self.share, 0.0, 1.0)

    def __call__(self, rows: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        if reference.means is None:
            return MeanOffset(self.share)(rows, reference)
        alike = ((rows @ reference.vocabulary.t()) / NEAR).softmax(dim=1)  # [N, V]
        return rows, self.share * (rows * (alike @ reference.means)).sum(dim=1)


def upper_quantile(values: Tensor, quantile: float) -> Tensor:
    """The quantile of every row of `[N, R]`, as `torch.quantile` with linear interpolation.

    It looks at the largest values only, takes any number of them, and can be exported to ONNX.
    """
    count = values.shape[1]
    place = quantile * (count - 1)
    low = int(place)
    largest = values.topk(count - low, dim=1).values
    above = largest[:, -2] if count - low > 1 else largest[:, -1]
    return torch.lerp(largest[:, -1], above, place - low)


RULES: tuple[type, ...] = (UnmentionedOffset, MeanOffset, QuantileOffset)


def describe_rule(rule: object) -> dict[str, Any]:
    """`{"_target_": class path, arguments}`, plain values and a valid node of a config.

    Raises:
        ConfigError: none of `RULES`.
    """
    if type(rule) not in RULES:
        known = ", ".join(kind.__name__ for kind in RULES)
        raise ConfigError(f"rule={type(rule).__name__}: a file can name {known} only")
    kind = type(rule)
    return {TARGET: f"{kind.__module__}.{kind.__qualname__}", **asdict(rule)}  # type: ignore[call-overload]


def build_rule(spec: Mapping[str, Any], where: str) -> Rule:
    """The rule that `describe_rule` described.

    Raises:
        CheckpointError: another class, or arguments that it does not take.
    """
    target = current(str(spec.get(TARGET)))
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in RULES}
    if target not in known:
        raise CheckpointError(f"{where}: names the rule {target!r}, known are {', '.join(known)}")
    try:
        rule: Rule = known[target](**{k: v for k, v in spec.items() if k != TARGET})
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{where}: its rule cannot be built: {error}") from error
    return rule
