"""The layout of the original's repositories on the Hub: read without their code, and written.

`config.json` names backbone and CLIP; `model.safetensors`, or its shards and their index, hold:

| tensors | what they are |
| --- | --- |
| `model.*` | the backbone in its publisher's names: torch.hub's DINOv2, timm's DINOv3 |
| `clip_model.*` without `visual.*` | CLIP's text tower in OpenAI's names, which are open_clip's |
| `proj.*` | ψ |
| `IGNORED` | CLIP's image side, PAMR's kernels, temperatures: nothing here reads them |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talk2dino.encoders.hub import WEIGHTS as OURS
from talk2dino.encoders.hub import HubTensorFile, hub_file, in_cache, split_hub_id
from talk2dino.encoders.weights import first_line, read_state_dict
from talk2dino.errors import CheckpointError, ConfigError
from talk2dino.files import (
    file_digest,
    read_json,
    replacing,
    replacing_folder,
    user_path,
    write_json,
)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIXES = {"vision": "model.", "text": "clip_model.", "projection": "proj."}
IGNORED = re.compile(
    r"clip_model\.(visual\..*|logit_scale|input_resolution|context_length|vocab_size)"
    r"|pamr\..*|logit_scale"
)
# `model_name` to timm's name; a name that is not here is timm's own, as for DINOv3
VISION_NAMES = {
    f"dinov2_vit{letter}14{suffix}": f"vit_{size}_patch14{registers}_dinov2.lvd142m"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for suffix, registers in (("", ""), ("_reg", "_reg4"))
}
# `clip_model_name` to open_clip's name; OpenAI's weights go with the quick GELU
TEXT_NAMES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
# `model_name` of the released models to the stem of `proj_class`, by which the original finds ψ's
# settings, and to the repository that holds the code to read such a file there
RELEASED = {
    "dinov2_vitb14_reg": ("vitb", "lorebianchi98/Talk2DINO-ViTB"),
    "dinov2_vitl14_reg": ("vitl", "lorebianchi98/Talk2DINO-ViTL"),
    "vit_base_patch16_dinov3.lvd1689m": ("dinov3_vitb", "lorebianchi98/Talk2DINOv3-ViTB"),
    "vit_large_patch16_dinov3.lvd1689m": ("dinov3_vitl", "lorebianchi98/Talk2DINOv3-ViTL"),
}
_SWITCHES = (  # of the original's settings; off in what is written
    *("with_bg_clean", "use_avg_text_token", "keep_cls", "keep_end_seq", "avg_self_attn_token"),
    "unfreeze_last_text_layer",
)
_PSI = {f"{n}.{k}" for n in ("linear_layer", "hidden_layers.0") for k in ("weight", "bias")}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OriginalRepository:
    """Where the weights lie and what they are; tensors are read when asked for.

    Attributes:
        location: absolute folder, or Hub id as it was given.
        config: content of `config.json`.
        hub: repository and commit, so that all files are of one state; None for a folder.
    """

    location: str
    config: dict[str, Any]
    hub: tuple[str, str] | None = None

    @property
    def weights(self) -> str:
        """What a spec has as `weights`; of a Hub repository with its commit."""
        return "@".join(self.hub) if self.hub else self.location

    @property
    def weights_file(self) -> Path | None:
        """`model.safetensors` of a folder, whether it is there or in shards; None on the Hub."""
        return None if self.hub else Path(self.location, WEIGHTS)

    def digest(self) -> str:
        """What tells these weights and settings from others: the commit, or the files' SHA-256."""
        if self.hub:
            return self.weights
        folder = Path(self.location)
        files = [folder / CONFIG, *sorted(folder.glob("model*.safetensors"))]
        return " ".join(map(file_digest, files))

    def specs(self) -> dict[str, dict[str, Any]]:
        """Config nodes that build the two encoders with these weights, `vision` and `text`.

        Raises:
            CheckpointError: a setting of another model than those that can be read here.
        """
        name, clip = self.config["model_name"], self.config["clip_model_name"]
        kind, size = self.config.get("proj_model"), self.config.get("resize_dim")
        if not isinstance(name, str) or not isinstance(size, int | None):
            raise self._error(f"model_name={name!r}, resize_dim={size!r}: give a text and pixels")
        if str(clip) not in TEXT_NAMES:
            raise self._error(f"clip_model_name={clip!r} is none of {', '.join(TEXT_NAMES)}")
        if kind not in (None, "ProjectionLayer"):
            raise self._error(
                f"proj_model={kind!r}: only ProjectionLayer is read from this layout; convert the "
                "original's .pth with python -m talk2dino.convert weights"
            )
        if self.config.get("use_avg_text_token"):
            raise self._error(
                "use_avg_text_token=true: here class names are embedded by CLIP's end token, so "
                "this model would segment differently"
            )
        vision = {
            "_target_": "talk2dino.encoders.vision.TimmVisionEncoder",
            "name": VISION_NAMES.get(name, name),
            "weights": self.weights,
            **({"image_size": size} if size else {}),
            "rope_in_attention": "dinov3" not in name,  # the original reads it before the rotation
        }
        text = {
            "_target_": "talk2dino.encoders.text.OpenClipTextEncoder",
            "name": TEXT_NAMES[clip],
            "weights": self.weights,
            "templates": "subset",
        }
        return {"vision": vision, "text": text}

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of `vision`, `text` or `projection`, float32, in names that the libraries know.

        The other parts are not read; on the Hub, the files are downloaded.

        Raises:
            CheckpointError: a file is missing or damaged, lacks the part, or has a tensor that
                belongs to none.
        """
        try:
            return self._read(part, lambda name: safe_open(self._file(name), framework="pt"))
        except (SafetensorError, HfHubHTTPError, OSError) as error:
            raise self._error(f"cannot read its weights ({first_line(error)})") from error

    def projection(self) -> dict[str, Tensor]:
        """Tensors of ψ; on the Hub nothing else is transferred, unless the file is here already.

        Raises:
            CheckpointError: as `tensors`, which is what a Hub without partial answers ends in.
        """
        if self.hub and not in_cache(WEIGHTS, *self.hub):
            hub, commit = self.hub
            try:
                return self._read("projection", lambda name: HubTensorFile(hub, name, commit))
            except CheckpointError:
                raise
            except Exception as error:  # see HubTensorFile
                _LOG.debug("%s: download of whole files instead: %s", self.location, error)
        return self.tensors("projection")

    def _read(self, part: str, opened: Callable[[str], Any]) -> dict[str, Tensor]:
        """A part from one file, or from those of its shards that hold it."""
        files: dict[str, Any] = {}
        try:
            files[WEIGHTS] = opened(WEIGHTS)
            places = dict.fromkeys(files[WEIGHTS].keys(), WEIGHTS)
        except FileNotFoundError:
            places = self._places()
        state: dict[str, Tensor] = {}
        for key in self._keys_of(part, places):
            if places[key] not in files:
                files[places[key]] = opened(places[key])
            tensor = files[places[key]].get_tensor(key)
            state[_current(key[len(PREFIXES[part]) :])] = tensor.float()
        if "register_tokens" in state:  # by this name timm knows torch.hub's DINOv2
            state.setdefault("mask_token", torch.empty(0))
        return state

    def _places(self) -> dict[str, str]:
        """File of every tensor, by the index of the shards."""
        try:
            file = self._file(INDEX)
            if not file.is_file():
                raise FileNotFoundError(file)
        except (HfHubHTTPError, OSError) as error:
            where = "on the Hub, or the Hub is out of reach" if self.hub else "in the folder"
            raise self._error(f"neither {WEIGHTS} nor {INDEX} is {where}") from error
        places = read_json(file, dict, "an index of shards").get("weight_map")
        if not isinstance(places, dict) or any(Path(str(n)).name != n for n in places.values()):
            raise self._error(f"{INDEX} has no weight_map of names of files")
        return places

    def _keys_of(self, part: str, keys: Iterable[str]) -> list[str]:
        """Keys of a part, once every key is known to belong somewhere."""
        known = tuple(PREFIXES.values())
        used = [key for key in keys if not IGNORED.fullmatch(key)]
        if strange := [key for key in used if not key.startswith(known)]:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise self._error(
                f"its weights hold {strange[0]!r}{more}, of no part of the model "
                f"({', '.join(f'{prefix}*' for prefix in known)})"
            )
        chosen = [key for key in used if key.startswith(PREFIXES[part])]
        if not chosen:
            raise self._error(f"its weights hold no {PREFIXES[part]}*, which are the {part}'s")
        return chosen

    def _file(self, name: str) -> Path:
        return hub_file(self.hub[0], name, self.hub[1]) if self.hub else Path(self.location, name)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.location}: {problem}")


def find_original(location: str | Path) -> OriginalRepository | None:
    """The repository at a folder, at its `model.safetensors`, or at a Hub id.

    Returns:
        None for everything else; `config.json` decides.

    Raises:
        DataError: a `config.json` that is none.
    """
    path = user_path(location)
    folder = path.parent if path.name in (WEIGHTS, INDEX) else path
    hub = None
    if path.exists():
        config = folder / CONFIG
        if not config.is_file() or (folder / OURS).is_file():
            return None
    elif (named := split_hub_id(str(location))) is None:
        return None
    else:
        try:
            config = hub_file(named[0], CONFIG, named[1])
        except (HfHubHTTPError, OSError):
            return None
        hub = named[0], config.parent.name  # the folder of a snapshot is named by its commit
    content = read_json(config, dict, "the original's settings")
    if not {"model_name", "clip_model_name"} <= content.keys():
        return None
    return OriginalRepository(str(location if hub else folder.resolve()), content, hub)


def read_weights(weights: str, part: str) -> dict[str, Tensor]:
    """State dict for an encoder: its part of an original repository, or all of a local file.

    Args:
        weights: folder, Hub id or file.
        part: `vision` or `text`, which is also the config's group.

    Raises:
        CheckpointError: a repository that cannot be read.
        EncoderError: no such file, or not a file of weights.
    """
    repository = find_original(weights)
    if repository is not None:
        return repository.tensors(part)
    return read_state_dict(user_path(weights), f"{part}.weights")


def published_names(vision: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str, str]:
    """`model_name` and `clip_model_name` of two encoders' specs.

    Raises:
        ConfigError: an encoder that no released model has, or patch tokens of other blocks.
    """
    names = {"vision": {VISION_NAMES.get(k, k): k for k in RELEASED}}
    names["text"] = {ours: theirs for theirs, ours in TEXT_NAMES.items()}
    for part, spec in (("vision", vision), ("text", text)):
        if spec["name"] not in names[part]:
            raise ConfigError(
                f"{part}.name={spec['name']}: the original's layout has {', '.join(names[part])}"
            )
    if vision.get("layers") is not None:
        raise ConfigError(
            f"vision.layers={list(vision['layers'])}: the original takes the last block's patch "
            "tokens only; write .safetensors"
        )
    return names["vision"][vision["name"]], names["text"][text["name"]]


def write_original(
    folder: Path,
    names: tuple[str, str],
    image_size: int,
    states: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a repository that this package reads, and the original's code as far as is known.

    What is not held here is left out: CLIP's image side and temperature. DINOv2's `cls_token`
    has its position added, as in timm, so that position is zero; so is `mask_token`.

    Args:
        folder: to create; it appears complete.
        names: of `published_names`.
        image_size: `resize_dim`.
        states: state dicts of `vision`, `text` and `projection`.

    Raises:
        ConfigError: the projection is not ψ of two layers.
    """
    if states["projection"].keys() != _PSI:
        raise ConfigError(f"output={folder}: the original's layout holds ψ of two layers only")
    parts = {**states, "vision": _of_torch_hub(states["vision"])}
    tensors = {
        PREFIXES[part] + key: tensor.detach().cpu().clone().contiguous()
        for part, state in parts.items()
        for key, tensor in state.items()
    }
    tensors["logit_scale"] = torch.tensor(log(1 / 0.07))  # what it starts and stays with
    stem, code = RELEASED[names[0]]
    config = {
        "architectures": ["Talk2DINO"],
        "auto_map": {
            "AutoConfig": f"{code}--configuration_talk2dino.Talk2DINOConfig",
            "AutoModel": f"{code}--modeling_talk2dino.Talk2DINO",
        },
        "model_name": names[0],
        "clip_model_name": names[1],
        "resize_dim": image_size,
        "proj_class": f"{stem}_mlp_infonce",
        "proj_name": f"{stem}_mlp_infonce",
        "proj_model": "ProjectionLayer",
        "disentangled_self_attn_token": True,
        **dict.fromkeys(_SWITCHES, False),
    }
    with replacing_folder(folder, whole=False) as draft:  # with one file it would be in the way
        with replacing(draft / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(draft / CONFIG, config)


def _current(key: str) -> str:
    """LayerScale by its name: libraries that rename `gamma` left `weight` in some files."""
    return re.sub(
        r"(\.ls[12])\.weight$", r"\1.gamma", re.sub(r"\.weight_([12])$", r".gamma_\1", key)
    )


def _of_torch_hub(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 with registers in the names of torch.hub; DINOv3 is published in timm's."""
    if "reg_token" not in state or "pos_embed" not in state:
        return dict(state)
    renamed = {"register_tokens" if key == "reg_token" else key: state[key] for key in state}
    cls = state["cls_token"]  # [1, 1, D]
    renamed["pos_embed"] = torch.cat([torch.zeros_like(cls), state["pos_embed"]], dim=1)
    return renamed | {"mask_token": torch.zeros_like(cls[0])}
