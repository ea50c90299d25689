"""Where images come from: COCO captions, folders, WebDataset tars, pictures without captions."""

from talk2dino.datasets.captions.base import Entry, Source, check_limit
from talk2dino.datasets.captions.coco import CocoCaptions
from talk2dino.datasets.captions.folder import CaptionFolder
from talk2dino.datasets.captions.picture_folder import PictureFolder
from talk2dino.datasets.captions.webdataset import WebDataset

__all__ = [
    "CaptionFolder",
    "CocoCaptions",
    "Entry",
    "PictureFolder",
    "Source",
    "WebDataset",
    "check_limit",
]
