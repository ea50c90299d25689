"""Files around the code, which no command reads: workflow, hooks, citation, templates, versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def version() -> str:
    found = re.search(r'^version = "(.+)"$', PYPROJECT, re.M)
    assert found
    return found[1]


def pinned(name: str, python: str = "3.11") -> dict[str, str]:
    """The versions that a constraints file names for a Python; each package once."""
    environment = {key: str(value) for key, value in default_environment().items()}
    versions: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate(environment | {"python_version": python}):
            key = canonicalize_name(one.name)
            assert key not in versions, f"{name}: {line} a second time on Python {python}"
            versions[key] = str(one.specifier).removeprefix("==")
    return versions


def stated() -> list[Requirement]:
    """Every requirement in pyproject.toml, of the core and of the extras, but the package's own."""
    core = PYPROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    extras = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[project.")[0]
    lines = [re.sub(r"#.*", "", line) for line in (core + extras).splitlines()]
    found = [Requirement(text) for line in lines for text in re.findall(r'"([^"]+)"', line)]
    return [one for one in found if one.name != "talk2dino"]


def test_the_workflow_runs_the_test_command_of_the_readme() -> None:
    job = read(".github/workflows/test.yml")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert tuple(matrix["python"]) == PYTHONS
    files = {*matrix["constraints"], *(case["constraints"] for case in matrix["include"])}
    assert files == {"constraints.txt", "constraints-oldest.txt"}
    assert all((ROOT / file).is_file() for file in files)
    [command] = [step["run"] for step in job["steps"] if "run" in step]
    words = re.sub(r"\$\{\{.*?\}\}", "CHOICE", command).split()
    assert words == ["make", "test", "PYTHON=python", "CONSTRAINTS=CHOICE", "TYPES=CHOICE"]
    assert re.search(r"^make test ", (ROOT / "README.md").read_text(), re.M)
    assert re.search(r"^test: ", MAKEFILE, re.M)
    for variable in ("PYTHON", "CONSTRAINTS", "TYPES"):
        assert re.search(rf"^{variable} \?= ", MAKEFILE, re.M)


def test_documents_and_help_name_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for text in texts for name in re.findall(r"`make ([\w-]+)", text.read_text())}
    named |= set(re.findall(r'@echo "make ([\w-]+)', MAKEFILE))
    assert {"quickstart", "test", "check", "docs", "dist"} <= named <= targets


def test_classifiers_name_the_pythons_of_the_workflow() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert tuple(named) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in PYPROJECT
    assert '"Typing :: Typed"' in PYPROJECT and (ROOT / "talk2dino" / "py.typed").is_file()


def test_hooks_are_the_calls_of_make_check() -> None:
    """They run the tools of the environment, so that no version stands in a second place."""
    check = MAKEFILE.partition("\ncheck:\n")[2].partition("\n\n")[0]
    called = re.findall(r"\$\(PY\) -m ((?:ruff|mypy)[^)\n]*)", check)
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["language"] for hook in hooks] == ["system"] * len(hooks)
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    tools = [re.sub(r"( --check)?( \.)?$", "", call) for call in called]
    assert entries == [f".venv/bin/python -m {tool}" for tool in tools]
    assert tools == ["ruff format", "ruff check", "mypy"]
    assert {"ruff", "mypy"} <= pinned("constraints.txt").keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_hold_one_version_of_each(python: str) -> None:
    versions = pinned("constraints.txt", python)
    for one in stated():
        name = canonicalize_name(one.name)
        if name in ("litdata", "webdataset"):  # of the extra bench, which is not installed
            continue
        assert one.specifier.contains(versions[name]), f"{name}=={versions[name]}, not {one}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds: dict[str, set[str]] = {}
    for one in stated():
        lower = [part.version for part in one.specifier if part.operator in (">=", "==")]
        bounds.setdefault(canonicalize_name(one.name), set()).update(lower)
    for name, found in pinned("constraints-oldest.txt").items():
        fits = [f"{found}.".startswith(f"{bound}.") for bound in bounds[name]]
        assert any(fits), f"{name}=={found}, but pyproject.toml says {bounds[name]}"


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    cited = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()
    assert cited["version"] == version()
    paper = cited["preferred-citation"]
    assert paper["year"] == 2025 and "ICCV" in paper["conference"]["name"]
    assert paper["identifiers"][0]["value"] == "arXiv:2411.19331"
    assert f'Paper = "{paper["url"]}"' in PYPROJECT
    readme = " ".join((ROOT / "README.md").read_text().split())
    authors = [f"{one['given-names'][0]}. {one['family-names']}" for one in paper["authors"]]
    assert ", ".join(authors) in readme
    assert paper["title"] in readme


def test_the_changelog_begins_with_this_version() -> None:
    heading = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading and heading[1] == version()
    assert heading[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", heading[2])


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_asks_something(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    kinds = {"input", "textarea", "dropdown", "checkboxes", "markdown"}
    fields = [field["id"] for field in form["body"]]
    assert len(set(fields)) == len(fields) > 0
    assert all(field["type"] in kinds for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_pull_request_template_names_the_checks() -> None:
    assert "`make check`" in (ROOT / ".github" / "pull_request_template.md").read_text()
