"""Extracted features: the store that holds them, its writer, and what streams it into training."""

from talk2dino.features.datamodule import FeatureDataModule
from talk2dino.features.store.reader import FeatureStore
from talk2dino.features.store.writer import write_store

__all__ = ["FeatureDataModule", "FeatureStore", "write_store"]
