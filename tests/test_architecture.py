"""docs/architecture.md against the code: who may import whom, and which library lives where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "talk2dino"
LAYERS = ["encoders", "features", "alignment", "segmentation", "evaluation", "inference"]
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
BELOW_ALL = {"errors", "atomic", "tables"}
COMMANDS = ("extract", "train", "evaluate", "segment", "export", "convert", "app")
ENTRY_POINTS = {f"{name}.py" for name in COMMANDS}
BEHIND_COMMANDS = {  # what a command builds from its config, too large for its own file
    "training/callbacks.py",
    "training/from_store.py",
    "sweeps/callback.py",
    "sweeps/evaluation_report.py",
}
CONFIG = {"cli.py", "config_errors.py", "config_schema.py", "config_types.py"}
ONLY_IN = {
    "hydra": ENTRY_POINTS | BEHIND_COMMANDS | CONFIG,
    "omegaconf": ENTRY_POINTS | BEHIND_COMMANDS | CONFIG,
    "gradio": {"web/page.py"},
    "jinja2": {"evaluation/report.py", "inference/model_card.py"},
    "numba": {"segmentation/compiled.py", "segmentation/pamr_vectors.py"},
    "optuna": {source for source in SOURCES if source.startswith("sweeps/")},
    "lightning": {
        "features/datamodule.py",
        "alignment/module.py",
        "alignment/callbacks.py",
        "alignment/head_records.py",
        "alignment/ema.py",
        "alignment/exact_resume.py",
        "alignment/trackers.py",
        "segmentation/datamodule.py",
        "segmentation/module.py",
        "segmentation/progress.py",
        "training/callbacks.py",
        "training/sample_segmentations.py",
        "sweeps/pruning.py",
        "train.py",
        "evaluate.py",
    },
    "h5py": {
        path for path in SOURCES if path.startswith("features/") and path != "features/mosaic.py"
    },
}


def imported(source: str) -> set[str]:
    """Dotted names of all modules that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / source).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide the direction"
            names.add(node.module or "")
            if node.module == "talk2dino":
                names |= {f"talk2dino.{alias.name}" for alias in node.names}
    return names


def layer(parts: list[str]) -> int:
    """-1 for what lies below all packages, then the packages, then the entry points."""
    if not parts or parts[0] in BELOW_ALL:
        return -1
    return LAYERS.index(parts[0]) if parts[0] in LAYERS else len(LAYERS)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_one_way(source: str) -> None:
    own = layer(source.removesuffix(".py").split("/"))
    if source == "__init__.py":
        return  # what a user imports: names from every layer, on first use
    for name in imported(source):
        package, *rest = name.split(".")
        if package == "talk2dino":
            assert layer(rest) <= own, f"{source} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_place(library: str) -> None:
    users = {s for s in SOURCES if any(n.split(".")[0] == library for n in imported(s))}
    assert users <= ONLY_IN[library], f"{library} in {users - ONLY_IN[library]}"


@pytest.mark.parametrize("source", SOURCES)
def test_no_work_at_import_time_in_plain_sight(source: str) -> None:
    """No sys.path, no device string, no pickle."""
    text = (PACKAGE / source).read_text()
    assert "sys.path" not in text
    assert '"cuda:0"' not in text and ".cuda()" not in text
    assert "import pickle" not in text
    assert "weights_only=False" not in text
