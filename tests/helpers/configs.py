"""Configs composed in-process, as a command would see them."""

from __future__ import annotations

from copy import copy
from typing import Any

import hydra
from hydra._internal import config_repository
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from talk2dino.config.checks import config_folder
from talk2dino.config.schemas import register_schema

CONF = config_folder()
GIVEN = {  # values that have no default
    "extract": ["store=s", "source.images=i", "source.annotations=a"],
    "train": ["store=s", "projection.text_dim=4", "projection.vision_dim=6"],
    "evaluate": ["checkpoint=c", "benchmark.images=i", "benchmark.masks=m", "benchmark.classes=t"],
    "segment": ["checkpoint=c", "image=i", "classes=[cat]"],
    "map": ["checkpoint=c", "image=i", "classes=[cat]"],
    "calibrate": ["checkpoint=c", "store=s"],
    "embed": ["checkpoint=c", "classes=[cat]"],
    "search": ["checkpoint=c", "store=s", "query=cat"],
}


def compose_quickly() -> None:
    """Leave out what Hydra does in vain; the tests start thousands of commands.

    It composes every config twice, first only to look for `hydra.mode`, which nothing in `conf/`
    sets, and each time it copies the schemas of all commands that this process has run.
    """
    copied = config_repository.CachingConfigRepository.__init__

    def shared(self: Any, delegate: Any) -> None:
        copied(self, None)
        self.delegate = copy(delegate)  # other sources are assigned to it, never changed

    config_repository.CachingConfigRepository.__init__ = shared
    look = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        asked = any("hydra.mode" in override for override in overrides)
        return look(self, config_name, overrides) if asked else None

    Hydra.get_mode = get_mode


def compose(command: str, *overrides: str) -> DictConfig:
    """The config as the entry point would see it, interpolations into Hydra included."""
    register_schema(command)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(command, list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "run"
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def needed(command: str, group: str, option: str) -> list[str]:
    """`GIVEN` without the keys that a choice does not have, with those that only it has."""
    given = list(GIVEN[command])
    if group == "source" and option != "coco_captions":
        given.remove("source.annotations=a")
    if option in ("mosaic", "webdataset") and group == "source":
        given.remove("source.images=i")
    if (group, option) == ("source", "webdataset"):
        given.append("source.tars=t")
    if (group, option) == ("vision", "timm"):
        given.append("vision.name=test_vit")
    if group == "benchmark" and option != "custom":
        given = [item for item in given if not item.startswith("benchmark.")]
    return given
