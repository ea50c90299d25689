"""What decides a result, and what tells runs apart."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from talk2dino.config.schemas import SCHEMAS
from talk2dino.evaluation.settings import DECIDING, compared, deciding

# keys that change no result: how fast, where to, what else is written
OTHERS = {
    "evaluate": {
        *(
            "checkpoint",
            "calibration",
            "vision",
            "text",
            "seed",
        ),  # the weights' digests are compared
        *("trainer", "batch_size", "window_batch_size", "num_workers"),
        *("compare_untrained", "pictures", "label_maps", "examples", "resume"),
    },
    "segment": {
        *("image", "output", "subfolders", "heatmaps", "resume", "overwrite", "accelerator"),
        *("calibration", "exemplars", "exemplar_weight"),  # their digests are compared
        # annotations are gathered from the pictures' own records
        *("formats", "instances", "minimum_area", "tolerance", "polygons", "image_root_url"),
    },
}


@pytest.mark.parametrize("command", DECIDING)
def test_every_key_of_a_command_is_sorted(command: str) -> None:
    keys = {item.name for item in fields(SCHEMAS[command])}
    chosen = {key for key in DECIDING[command] if "." not in key}
    assert chosen.isdisjoint(OTHERS[command])
    assert keys == chosen | OTHERS[command]


def config(**changes: Any) -> dict[str, Any]:
    benchmark = {
        "_target_": "talk2dino.segmentation.folder.FolderBenchmark",
        "name": "voc",
        "root": "data/voc",
        "window": 448,
        "limit": None,
        "reference": {"paper": 87.1},
    }
    plain = {"checkpoint": "run", "pamr": True, "pamr_whole_image": False, "seed": 3}
    trainer = {"precision": "bf16-mixed", "devices": 4}
    return plain | {"benchmark": benchmark, "trainer": trainer, "pictures": 6} | changes


def test_the_deciding_entries() -> None:
    chosen = deciding(config(), "evaluate")
    assert list(chosen) == list(DECIDING["evaluate"])
    assert chosen["trainer.precision"] == "bf16-mixed" and chosen["refinement"] is None
    assert deciding({"trainer": None}, "evaluate")["trainer.precision"] is None


def test_runs_are_told_apart_by_what_decides_them() -> None:
    assert compared(config()) == {
        "benchmark._target_": "talk2dino.datasets.benchmarks.labeled_folders.FolderBenchmark",
        "benchmark.window": 448,
        "benchmark.limit": None,
        "refinement": None,
        "pamr_whole_image": False,
        "trainer.precision": "bf16-mixed",
        "seed": 3,
    }
    later = config(refinement={"_target_": "x.KNN", "k": 8, "scope": "window", "power": None})
    assert deciding(later, "evaluate")["refinement"] == {"_target_": "x.KNN", "k": 8}
    cleaned = [compared(config(benchmark={"lambda_bg": weight})) for weight in (0.2, 0.3)]
    assert [one.get("benchmark.lambda_bg") for one in cleaned] == [None, 0.3]  # in no older config
    failed = config(refinement={"calibrated": {"_target_": "x.KNN"}, "uncalibrated": None})
    assert deciding(failed, "evaluate")["refinement"] is None
    picture = config(refinement={"_target_": "x.KNN", "k": 8, "scope": "picture", "power": 3})
    assert compared(picture)["refinement.scope"] == "picture"
    knn = config(refinement={"_target_": "x.KNN", "k": "${oops}"}, benchmark=None)
    assert compared(knn)["refinement._target_"] == "x.KNN"
    assert "refinement.k" not in compared(knn)


def test_runs_that_differ_in_their_encoders_alone() -> None:
    """Batch sizes change no figure; an encoder that the checkpoint names is not in the config."""
    small = {"_target_": "talk2dino.encoders.bert_text.BertTextEncoder", "name": "small"}
    found = [
        compared(config(text=small | {"name": name, "batch_size": size}, vision=None))
        for name, size in (("small", 8), ("large", 16))
    ]
    assert found[0]["text._target_"] == "talk2dino.encoders.text.BertTextEncoder"
    differing = {key for key in found[0] if found[0][key] != found[1][key]}
    assert differing == {"text.name"}
    assert found[0].keys() - compared(config()).keys() == {"text._target_", "text.name"}
