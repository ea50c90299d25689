"""How a picture is segmented, apart from model and classes: sizes, windows, background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from talk2dino.errors import ConfigError

MODEL_SIZES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}  # by width of the vision encoder


@dataclass(kw_only=True)
class Protocol:
    """The settings of the sliding window, the same for a benchmark and for a picture of your own.

    A benchmark is a protocol with images (`benchmarks.base.Benchmark`); `Segmenter` takes either.

    Attributes:
        short_side: pixels of the short side before windows are cut.
        long_side: upper limit of the long side in pixels.
        window: side of a window in pixels.
        stride: distance of windows in pixels.
        input_size: the encoder sees every window at this size, a square, in pixels.
        background_cleaning: mix in the attention of the heads that fit a class.
        lambda_bg: weight of that attention, 0..1.
        background_threshold: score of the background channel; a number, numbers by model size
            (`ViT-S`, `ViT-B`, `ViT-L`) and `default` for all others, or None for no background.

    Raises:
        ConfigError: a size that is not positive, a stride that leaves gaps, or a threshold by
            model size that does not fit every model.

    >>> Protocol(window=224, stride=112).threshold(768) is None
    True
    >>> Protocol(background_threshold={"default": 0.55, "ViT-L": 0.54}).threshold(1024)
    0.54
    """

    short_side: int = 448
    long_side: int = 2048
    window: int = 448
    stride: int = 224
    input_size: int = 448
    background_cleaning: bool = False
    lambda_bg: float = 0.2
    background_threshold: float | Mapping[str, float] | None = None

    _key: ClassVar[str] = ""  # what stands before a setting's name in an error

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side", "window", "stride", "input_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self._key}{name}={getattr(self, name)}: use 1 or more pixels")
        if self.stride > self.window:
            raise ConfigError(
                f"{self._key}stride={self.stride} leaves gaps between windows of {self.window} "
                f"pixels; use at most {self._key}window={self.window}"
            )
        self.threshold(None)  # refuses a mapping that does not fit every model

    def threshold(self, vision_width: int | None) -> float | None:
        """The background's score for a model, or None if there is no background.

        Args:
            vision_width: D of the vision encoder; None for an unknown model.

        Raises:
            ConfigError: the mapping has an unknown key or no `default`.
        """
        given = self.background_threshold
        if isinstance(given, Mapping):
            known = {*MODEL_SIZES.values(), "default"}
            if "default" not in given or not known.issuperset(given):
                raise ConfigError(
                    f"{self._key}background_threshold={dict(given)}: give a number, or numbers "
                    f"by {', '.join(sorted(known))}; default is needed"
                )
            given = given.get(MODEL_SIZES.get(vision_width or 0, ""), given["default"])
        return None if given is None else float(given)
