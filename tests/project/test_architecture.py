"""docs/architecture.md against the code: who may import whom, which library lives where, sizes."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "talk2dino"
TESTS = Path(__file__).parents[1]
TEST_FILES = sorted(set(TESTS.rglob("*.py")) - set(TESTS.glob("data/**/*.py")))
LAYERS = [  # imports point to the left; commands stand to the right of all
    "encoders",
    "datasets",
    "features",
    "alignment",
    "segmentation",
    "evaluation",
    "annotations",
    "calibration",
    "finding",
    "inference",
    "maps",
    "config",
    "sweeps",
    "training",
    "web",
    "serving",
    "videos",
]
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
BELOW_ALL = {"errors", "files", "renamed"}
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
COMMANDS = {path.stem for path in PACKAGE.glob("*.py") if path.stem not in (*BELOW_ALL, "__init__")}
HYDRA = {  # what composes a config or builds from it
    *(f"{name}.py" for name in COMMANDS),
    *(source for source in SOURCES if source.startswith("config/")),
    "training/callbacks.py",
    "sweeps/table.py",
}
ONLY_IN = {
    "hydra": HYDRA,
    "omegaconf": HYDRA,
    "cv2": {source for source in SOURCES if source.startswith("annotations/")},
    "gradio": {"web/page.py"},
    "av": {"videos/frames.py", "videos/video_files.py"},
    "fastapi": {"serving/server.py", "serving/forms.py"},
    "httpx": {"serving/ml_backend.py"},
    "prometheus_client": {"serving/gate.py", "serving/server.py"},
    "jinja2": {"evaluation/report.py", "inference/model_card.py", "finding/found_files.py"},
    "pycocotools": {"annotations/base.py", "annotations/outlines.py"},
    "shapely": {"annotations/outlines.py", "annotations/geojson.py"},
    "numba": {source for source in SOURCES if source.startswith("segmentation/")},
    "triton": {"segmentation/refinement/pamr_triton.py"},
    "optuna": {"sweeps/study.py"},
    "rasterio": {source for source in SOURCES if source.startswith("maps/")},
    "lightning": {
        "features/datamodule.py",
        "alignment/module.py",
        "evaluation/datamodule.py",
        "evaluation/module.py",
        "sweeps/study.py",
        "train.py",
        "evaluate.py",
        *(source for source in SOURCES if source.startswith("training/")),
    },
    "h5py": {source for source in SOURCES if source.startswith("features/")},
}
SLOW = {"lightning", "timm", "torchvision", "torchmetrics", "transformers", "gradio"}  # to import
LARGEST_FILE = 400  # lines
LARGEST_FOLDER = 13  # modules; the root, which holds the commands, has 20
SAME_NAME = {"__init__.py", "base.py", "module.py", "datamodule.py"}  # idioms


@cache
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


@cache
def imported_at_once(source: str) -> set[str]:
    """Those of `imported` that run with the file itself: none in a function or for types only."""
    tree = ast.parse((PACKAGE / source).read_text())
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def loaded_by(source: str) -> set[str]:
    """Dotted names of all modules that importing a file loads through files of this package."""
    names: set[str] = set()
    files, todo = set(), [source]
    while todo:
        if (file := todo.pop()) not in files:
            files.add(file)
            names |= (found := imported_at_once(file))
            for name in found:
                parts = name.split(".")[1:] if name.startswith("talk2dino") else []
                paths = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
                todo += [f for path in paths for f in (f"{path}/__init__.py", f"{path}.py")]
            todo = [file for file in todo if file in SOURCES]
    return names


def layer(parts: list[str]) -> int:
    """-1 for what lies below all packages, then the packages, then the commands."""
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


@pytest.mark.parametrize("source", sorted(f"{name}.py" for name in COMMANDS - {"__main__"}))
def test_no_command_imports_another(source: str) -> None:
    others = {f"talk2dino.{name}" for name in COMMANDS} - {f"talk2dino.{source[:-3]}"}
    assert not imported(source) & others


@pytest.mark.parametrize("source", sorted(f"{name}.py" for name in COMMANDS - {"__main__"}))
def test_what_takes_seconds_to_import_is_imported_where_it_is_used(source: str) -> None:
    """So that `--help` and a mistyped word are answered soon; two build on Lightning's classes."""
    slow = {name.split(".")[0] for name in loaded_by(source)} & SLOW
    assert slow == ({"lightning"} if source in ("train.py", "evaluate.py") else set())


def drawn() -> dict[str, set[str]]:
    """The arrows of the page."""
    arrows = re.findall(r"^(\w+) ─+▶ (.+)$", PAGE.read_text(), re.M)
    return {package: set(targets.split(", ")) for package, targets in arrows}


def reached(package: str, arrows: dict[str, set[str]]) -> set[str]:
    found = arrows.get(package, set())
    return found | {far for near in found for far in reached(near, arrows)}


def test_the_drawing_is_what_the_code_imports() -> None:
    used: dict[str, set[str]] = {}
    for source in SOURCES:
        own = source.split("/")[0] if "/" in source else "commands"
        if source != "__init__.py":
            names = [name.split(".") for name in imported(source) if name.startswith("talk2dino.")]
            used.setdefault(own, set()).update(
                n[1] for n in names if n[1] in LAYERS and n[1] != own
            )
    arrows = drawn()
    for package, targets in used.items():
        assert targets <= reached(package, arrows), (
            f"{package}: {targets - reached(package, arrows)}"
        )
    for package, targets in arrows.items():
        assert targets <= used[package], f"{package}: no import of {targets - used[package]}"


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGE.read_text())))
)
def test_files_that_the_page_names_exist(name: str) -> None:
    roots = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir()), PAGE.parents[1]]
    assert any((root / name).is_file() for root in roots)


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_place(library: str) -> None:
    users = {s for s in SOURCES if any(n.split(".")[0] == library for n in imported(s))}
    assert users <= ONLY_IN[library], f"{library} in {users - ONLY_IN[library]}"


def test_files_are_read_in_one_sitting_and_folders_seen_at_a_glance() -> None:
    lengths = {source: len((PACKAGE / source).read_text().splitlines()) for source in SOURCES}
    assert max(lengths.values()) <= LARGEST_FILE, max(lengths, key=lengths.__getitem__)
    for folder, files in Counter(str(Path(source).parent) for source in SOURCES).items():
        assert files <= (20 if folder == "." else LARGEST_FOLDER), folder


@pytest.mark.parametrize("source", SOURCES)
def test_texts_of_users_are_printed_as_they_are(source: str) -> None:
    """Rich takes `[/b]` for markup, and may end in a traceback, and `:cat:` for a picture."""
    for arguments in re.findall(r"\bConsole\((.*?)\)", (PACKAGE / source).read_text()):
        plain = "markup=False, emoji=False" in arguments or "stderr=True" in arguments
        assert plain or source == "doctor.py", f"Console({arguments})"


def test_no_two_files_share_a_name() -> None:
    names = Counter(Path(source).name for source in SOURCES)
    assert {name for name, count in names.items() if count > 1} <= SAME_NAME


def test_no_two_things_share_a_name() -> None:
    """Public classes and functions of modules, but for what commands and engines have alike."""
    alike = {"main", "report", "require_all", "compiled"}
    names = Counter(
        node.name
        for source in SOURCES
        for node in ast.parse((PACKAGE / source).read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} <= alike


@pytest.mark.parametrize("source", SOURCES)
def test_no_work_at_import_time_in_plain_sight(source: str) -> None:
    """No sys.path, no device string, no pickle."""
    text = (PACKAGE / source).read_text()
    assert "sys.path" not in text
    assert '"cuda:0"' not in text and ".cuda()" not in text
    assert "import pickle" not in text
    assert "weights_only=False" not in text


def test_tests_lie_where_their_subject_lies() -> None:
    """A folder for each package, for the commands, and for what concerns the whole project."""
    files = [path for path in TEST_FILES if path.name != "__init__.py"]
    folders = Counter(path.parent for path in files)
    assert {str(folder.relative_to(TESTS)) for folder in folders} <= {
        *LAYERS,
        "commands",
        "project",
        "helpers",
        ".",  # conftest.py
    }
    assert max(folders.values()) <= LARGEST_FOLDER, max(folders, key=folders.__getitem__)
    assert all((folder / "__init__.py").exists() for folder in folders)
    tests = {path for path in files if path.name.startswith("test_")}
    assert {path.parent for path in set(files) - tests} == {TESTS, TESTS / "helpers"}
    assert {path.parent for path in tests}.isdisjoint({TESTS, TESTS / "helpers"})


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: file.stem)
def test_no_test_file_imports_another(file: Path) -> None:
    """What two of them need lies in tests/helpers."""
    tree = ast.parse(file.read_text())
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [name for name in names if name.rpartition(".")[2].startswith(("test_", "conftest"))]
