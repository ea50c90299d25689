"""Classes under the dotted names that they had in earlier versions.

Configs, feature stores, checkpoints and records of evaluations name classes as `_target_`. Names
are translated where such a file is read, and on both sides where one is compared with a present
config. So a class may move: its old name is added to `RENAMED`, and nothing else needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TARGET = "_target_"


def _moved(old: str, new: str, *names: str) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in names}


_HEADS = "talk2dino.alignment.similarity.heads"
_TEXT = "talk2dino.encoders.text"

RENAMED: Mapping[str, str] = {  # old dotted name: present one
    **_moved("talk2dino.cli", "talk2dino.config.command", "ExitStatus"),
    **_moved("talk2dino.sweeps.callback", "talk2dino.sweeps.table", "SweepTable"),
    **_moved("talk2dino.sweeps.evaluation_report", "talk2dino.sweeps.table", "SweepReport"),
    # sources of captioned images
    **_moved(
        "talk2dino.features.sources",
        "talk2dino.datasets.captions",
        *("CaptionFolder", "CocoCaptions", "WebDataset"),
    ),
    **_moved(
        "talk2dino.features.sources.coco_captions", "talk2dino.datasets.captions", "CocoCaptions"
    ),
    **_moved("talk2dino.features.sources.folder", "talk2dino.datasets.captions", "CaptionFolder"),
    **_moved("talk2dino.features.sources.webdataset", "talk2dino.datasets.captions", "WebDataset"),
    **_moved("talk2dino.features.sources", "talk2dino.datasets.mosaic", "Mosaic"),
    **_moved("talk2dino.features.sources.mosaic", "talk2dino.datasets.mosaic", "Mosaic"),
    # benchmarks
    **_moved(
        "talk2dino.segmentation.folder",
        "talk2dino.datasets.benchmarks.labeled_folders",
        "FolderBenchmark",
    ),
    **_moved(
        "talk2dino.segmentation.cityscapes",
        "talk2dino.datasets.benchmarks.public_datasets",
        "CityscapesBenchmark",
    ),
    **_moved(
        "talk2dino.segmentation.coco_stuff",
        "talk2dino.datasets.benchmarks.public_datasets",
        *("CocoObjectBenchmark", "CocoStuffBenchmark"),
    ),
    **_moved("talk2dino.segmentation.mosaic", "talk2dino.datasets.mosaic", "MosaicBenchmark"),
    # refinements of label maps
    # **_moved("talk2dino.segmentation.knn", "talk2dino.segmentation.refinement.knn", "KNN"),
    # **_moved("talk2dino.segmentation.pamr", "talk2dino.segmentation.refinement.pamr", "PAMR"),
    # similarities by the modules that held them; `talk2dino.alignment.similarity` has them all
    **_moved(
        "talk2dino.alignment.all_pairs", _HEADS, "MaxRowSum", "MeanHeads", "Nucleus", "SumHeads"
    ),
    **_moved(
        "talk2dino.alignment.paired_heads",
        _HEADS,
        *("MaxScore", "SampledHead", "SoftHead", "WeightedAverage"),
    ),
    # text encoders by the modules that held them
    **_moved("talk2dino.encoders.bert_text", _TEXT, "BertTextEncoder"),
    **_moved("talk2dino.encoders.open_clip_text", _TEXT, "OpenClipTextEncoder"),
    **_moved("talk2dino.encoders.sentence_text", _TEXT, "SentenceTransformerTextEncoder"),
}


def current(name: str) -> str:
    """The present dotted name of a class or function, by any name that it has had.

    >>> current("talk2dino.cli.ExitStatus")
    'talk2dino.config.command.ExitStatus'
    >>> current("torch.optim.Adam")
    'torch.optim.Adam'
    """
    return RENAMED.get(name, name)


def with_current_names(value: Any) -> Any:
    """A copy of nested dicts and lists in which every `_target_` has its present name.

    Keys may be dotted, as `benchmark._target_` in the records of an evaluation.
    """
    if isinstance(value, Mapping):
        return {
            key: current(item)
            if isinstance(item, str) and str(key).rpartition(".")[2] == TARGET
            else with_current_names(item)
            for key, item in value.items()
        }
    return [with_current_names(item) for item in value] if isinstance(value, list) else value
