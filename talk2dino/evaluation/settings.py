"""The settings of a run: which of them decide its result, which are refused, and where it ran.

A result belongs to the settings that decide it. An evaluation goes on with records of the same ones
only, a picture is segmented again when one has changed, and runs in a table are labeled by those in
which they differ. All other keys decide how fast a command is, or what it writes besides.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import ConfigError
from talk2dino.renamed import flatten, with_current_names

# Config keys that decide a result, by command. The weights that an evaluation's figures depend on
# are described by their digests instead, whatever the path of the checkpoint: `describe_run`.
DECIDING = {
    "evaluate": ("benchmark", "refinement", "pamr", "pamr_whole_image", "trainer.precision"),
    "segment": (
        *("checkpoint", "classes", "negatives", "templates", "background", "pamr", "short_side"),
        *("refinement", "vision", "text"),
    ),
}
# keys that configs did not have at first, with what the results were then
_LATER: Mapping[str, Mapping[str, Any]] = {
    "benchmark": {"lambda_bg": 0.2},
    "refinement": {"scope": "window", "power": None},
}
# of an encoder's spec, what changes no figure or stands in its digest
_NOT_OF_SPEC = ("weights", "batch_size", "image_size")
# what a table of runs shows in rows and columns of its own, and where the files lie
_NOT_COMPARED = (
    *("pamr", "benchmark.name", "benchmark.root", "benchmark.reference"),
    *("vision.batch_size", "text.batch_size"),
)
PRECISION = "32-true"  # the trainer's, where a config does not say
PACKAGES = (
    *("talk2dino", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow"),
)


def deciding(config: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The entries of a plain config that decide a command's results, by dotted key."""
    chosen = {}
    for key in DECIDING[command]:
        node, _, name = key.rpartition(".")
        chosen[key] = (config.get(node) or {} if node else config).get(name)
    given = chosen.get("refinement")
    if given and "calibrated" in given:  # `auto`, of a run that failed before it was settled
        given = chosen["refinement"] = None
    for name, later in _LATER.items():
        if isinstance(found := chosen.get(name), Mapping):
            chosen[name] = {k: v for k, v in found.items() if k not in later or v != later[k]}
    if command == "segment" and not given:  # results of before do not name it
        chosen.pop("refinement")
    return chosen


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which runs of one benchmark are told apart in a table, flat with dotted keys.

    The seed is one of them: it decides a freshly initialized projection.
    """
    encoders = {side: config[side] for side in ("vision", "text") if config.get(side)}
    chosen = deciding(config, "evaluate") | encoders
    chosen |= {"seed": config.get("seed")}
    if config.get("calibration"):
        chosen["calibration"] = config["calibration"]
    return {
        key: value
        for key, value in settled(with_current_names(chosen)).items()
        if not any(f"{key}.".startswith(f"{other}.") for other in _NOT_COMPARED)
    }


def settled(node: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config by dotted keys, without empty nodes and those that point elsewhere.

    The config of a failed job is not resolved.
    """
    flat = flatten(node)
    return {key: value for key, value in flat.items() if value != {} and "${" not in str(value)}


def describe_run(
    config: Mapping[str, Any],
    vision: nn.Module,
    text: TextEncoder,
    projection: nn.Module,
    benchmark: Benchmark,
) -> dict[str, Any]:
    """Everything that decides the figures of an evaluation, as plain values.

    The limit of a benchmark is left out, for every image has a record of its own.
    """
    chosen = deciding(config, "evaluate")
    protocol = chosen.pop("benchmark") or {}
    described = text.describe()
    return {
        "classes": [asdict(spec) for spec in benchmark.class_list.classes],
        "unlabelled": list(benchmark.class_list.unlabeled),
        **{f"benchmark.{k}": v for k, v in protocol.items() if k not in ("reference", "limit")},
        **chosen,
        "refinement": chosen["refinement"] or None,  # an empty node is none
        "trainer.precision": str(chosen["trainer.precision"] or PRECISION),
        "projection": state_dict_digest(projection),
        "vision": state_dict_digest(vision),
        "text": described["weights_sha256"],
        **_of_spec("vision", getattr(vision, "spec", None)),
        **_of_spec("text", described.get("spec")),
    }


def _of_spec(side: str, spec: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{side}.{k}": v for k, v in (spec or {}).items() if k not in _NOT_OF_SPEC}


def check_encoder_precision(precision: str) -> None:
    """Refuse a precision that would reach beyond the encoder.

    Raises:
        ConfigError: `bf16-true` and its like, which convert the class embeddings as well.
    """
    if precision.endswith("-true") and not precision.startswith(("32", "64")):
        mixed = precision.replace("-true", "-mixed")
        raise ConfigError(
            f"trainer.precision={precision}: would round the class scores too; use {mixed}, which "
            "runs the encoder alone in lower precision"
        )


def describe_environment(accelerator: str | None, precision: str) -> dict[str, str]:
    """Versions and device, for the report."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    return found | {"device": device, "precision": precision}
