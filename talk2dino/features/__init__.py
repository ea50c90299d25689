"""Extracted features: the store that holds them, its writer, and what streams it into training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from talk2dino.features.store.reader import FeatureStore
from talk2dino.features.store.writer import write_store

if TYPE_CHECKING:
    from talk2dino.features.datamodule import FeatureDataModule

__all__ = ["FeatureDataModule", "FeatureStore", "write_store"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading and writing a store need no Lightning, which takes seconds."""
    if name == "FeatureDataModule":
        from talk2dino.features.datamodule import FeatureDataModule

        return FeatureDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
