"""Where captioned images come from: COCO captions, folders, WebDataset tars."""

from talk2dino.datasets.captions.base import Entry, Source, check_limit
from talk2dino.datasets.captions.coco import CocoCaptions
from talk2dino.datasets.captions.folder import CaptionFolder
from talk2dino.datasets.captions.webdataset import WebDataset

__all__ = ["CaptionFolder", "CocoCaptions", "Entry", "Source", "WebDataset", "check_limit"]
