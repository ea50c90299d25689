"""How a caption and an image are compared: one class per strategy, always `[text, image]`.

`heads.py` has Talk2DINO's `MaxScore` and its alternatives, `dense.py` the dense alignment,
`all_pairs.py` what compares without a choice, `base.py` the two stages that all of them share.
"""

from talk2dino.alignment.similarity.all_pairs import (
    DotProduct,
    MaxRowSum,
    MeanHeads,
    Nucleus,
    SumHeads,
)
from talk2dino.alignment.similarity.base import Similarity
from talk2dino.alignment.similarity.dense import Dense
from talk2dino.alignment.similarity.heads import (
    MaxScore,
    PairedHead,
    SampledHead,
    SoftHead,
    WeightedAverage,
    head_choice,
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
    "head_choice",
]
