"""From features and class embeddings to label maps."""

from talk2dino.segmentation.knn import KNN
from talk2dino.segmentation.pamr import PAMR
from talk2dino.segmentation.scores import clean_background
from talk2dino.segmentation.segmenter import Segmentation, Segmenter
from talk2dino.segmentation.windows import sliding_windows

__all__ = ["KNN", "PAMR", "Segmentation", "Segmenter", "clean_background", "sliding_windows"]
