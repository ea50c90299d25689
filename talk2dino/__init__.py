"""Teach a self-supervised vision backbone to understand language, then segment what you name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talk2dino.alignment.checkpoint import load_projection
    from talk2dino.inference.class_embeddings import ClassEmbeddings
    from talk2dino.inference.exemplars import Exemplar
    from talk2dino.inference.model import Talk2DINO

    __version__: str

__all__ = ["ClassEmbeddings", "Exemplar", "Talk2DINO", "__version__", "load_projection"]


_MODULES = {
    "ClassEmbeddings": "talk2dino.inference.class_embeddings",
    "Exemplar": "talk2dino.inference.exemplars",
    "Talk2DINO": "talk2dino.inference.model",
    "load_projection": "talk2dino.alignment.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `python -m talk2dino.…  --help` answers at once."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("talk2dino")
        except PackageNotFoundError:
            return "checkout"  # a source tree that was never installed
    raise AttributeError(f"module 'talk2dino' has no attribute {name!r}")
