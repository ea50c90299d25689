"""From features and class embeddings to label maps."""

from talk2dino.segmentation.refinement.knn import KNN
from talk2dino.segmentation.refinement.pamr import PAMR
from talk2dino.segmentation.scores import clean_background
from talk2dino.segmentation.segmenter import Segmentation, Segmenter
from talk2dino.segmentation.windows import sliding_windows

__all__ = ["KNN", "PAMR", "Segmentation", "Segmenter", "clean_background", "sliding_windows"]
