"""Where captioned images come from: COCO captions, folders, WebDataset tars, mosaic scenes."""

from talk2dino.features.sources.base import Entry, Source, check_limit
from talk2dino.features.sources.coco_captions import CocoCaptions
from talk2dino.features.sources.folder import CaptionFolder
from talk2dino.features.sources.mosaic import Mosaic
from talk2dino.features.sources.webdataset import WebDataset

__all__ = [
    "CaptionFolder",
    "CocoCaptions",
    "Entry",
    "Mosaic",
    "Source",
    "WebDataset",
    "check_limit",
]
