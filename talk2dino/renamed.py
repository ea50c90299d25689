"""Classes under the dotted names that they had in earlier versions, and settings that name them.

Configs, feature stores, checkpoints and records of evaluations name classes as `_target_`. Names
are translated where such a file is read, and on both sides where one is compared with a present
config. So a class may move: a row is added to the table, and nothing else needs to know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TARGET = "_target_"
_MOVED = (  # former module, present module, classes
    ("cli", "config.command", "ExitStatus"),
    ("sweeps.callback", "sweeps.table", "SweepTable"),
    ("sweeps.evaluation_report", "sweeps.table", "SweepReport"),
    ("features.sources", "datasets.captions", "CaptionFolder CocoCaptions WebDataset"),
    ("features.sources.coco_captions", "datasets.captions", "CocoCaptions"),
    ("features.sources.folder", "datasets.captions", "CaptionFolder"),
    ("features.sources.webdataset", "datasets.captions", "WebDataset"),
    ("features.sources", "datasets.mosaic", "Mosaic"),
    ("features.sources.mosaic", "datasets.mosaic", "Mosaic"),
    ("segmentation.folder", "datasets.benchmarks.labeled_folders", "FolderBenchmark"),
    ("segmentation.cityscapes", "datasets.benchmarks.public_datasets", "CityscapesBenchmark"),
    (
        "segmentation.coco_stuff",
        "datasets.benchmarks.public_datasets",
        "CocoObjectBenchmark CocoStuffBenchmark",
    ),
    ("segmentation.mosaic", "datasets.mosaic", "MosaicBenchmark"),
    ("segmentation.knn", "segmentation.refinement.knn", "KNN"),
    ("segmentation.pamr", "segmentation.refinement.pamr", "PAMR"),
    ("alignment.all_pairs", "alignment.similarity", "MaxRowSum MeanHeads Nucleus SumHeads"),
    (
        "alignment.paired_heads",
        "alignment.similarity",
        "MaxScore SampledHead SoftHead WeightedAverage",
    ),
    ("alignment.visual_projection", "alignment.projection", "VisualProjectionLayer"),
    ("encoders.bert_text", "encoders.text", "BertTextEncoder"),
    ("encoders.open_clip_text", "encoders.text", "OpenClipTextEncoder"),
    ("encoders.sentence_text", "encoders.text", "SentenceTransformerTextEncoder"),
)
RENAMED: Mapping[str, str] = {  # former dotted name: present one
    f"talk2dino.{old}.{name}": f"talk2dino.{new}.{name}"
    for old, new, names in _MOVED
    for name in names.split()
} | {"talk2dino.training.texts.caption_word_loss": "talk2dino.alignment.word_loss.WordOptions"}


def current(name: str) -> str:
    """The present dotted name of a class or function, by any name that it has had.

    >>> from talk2dino.renamed import current
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


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{path}.{key}" if path else str(key))
    return flat


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first dotted key, by name, whose value in two settings differs, and both values.

    Classes count under their present names, an absent key as None, and as in a JSON file a tuple
    is a list.

    >>> from talk2dino.renamed import first_difference
    >>> first_difference({"loss": {"margin": 0.2}, "seed": 0}, {"loss": {"margin": 0.3}, "seed": 0})
    ('loss.margin', 0.2, 0.3)
    """
    before, now = (flatten(with_current_names(json.loads(json.dumps(one)))) for one in (old, new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None
