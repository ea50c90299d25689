"""Feature extraction's results: the store, its writer, and what streams it into training."""

from talk2dino.features.datamodule import FeatureDataModule
from talk2dino.features.from_arrays import write_store
from talk2dino.features.store import FeatureStore

__all__ = ["FeatureDataModule", "FeatureStore", "write_store"]
