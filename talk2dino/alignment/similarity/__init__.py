"""How a caption and an image are compared: one class per strategy, always `[text, image]`."""

from talk2dino.alignment.similarity.base import Similarity
from talk2dino.alignment.similarity.dense import Dense, DotProduct
from talk2dino.alignment.similarity.heads import (
    MaxRowSum,
    MaxScore,
    MeanHeads,
    Nucleus,
    PairedHead,
    SampledHead,
    SoftHead,
    SumHeads,
    WeightedAverage,
)

__all__ = [
    "Dense",
    "DotProduct",
    "MaxRowSum",
    "MaxScore",
    "MeanHeads",
    "Nucleus",
    "PairedHead",
    "SampledHead",
    "Similarity",
    "SoftHead",
    "SumHeads",
    "WeightedAverage",
]
