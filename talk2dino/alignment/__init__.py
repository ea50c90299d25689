"""Text and image in one space: projections, similarities, losses, retrieval, checkpoints."""

from talk2dino.alignment import similarity
from talk2dino.alignment.losses import InfoNCE, TripletLoss
from talk2dino.alignment.projection import DoubleMLP, ProjectionLayer, VisualProjectionLayer
from talk2dino.encoders.attention import pool_attention

__all__ = [
    "DoubleMLP",
    "InfoNCE",
    "ProjectionLayer",
    "TripletLoss",
    "VisualProjectionLayer",
    "pool_attention",
    "similarity",
]
