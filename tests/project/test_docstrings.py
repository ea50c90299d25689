"""The examples in docstrings are run, and every public name has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    "talk2dino",
    "talk2dino.alignment",
    "talk2dino.alignment.similarity",
    "talk2dino.features",
    "talk2dino.segmentation",
)
FURTHER = (
    "talk2dino.alignment.retrieval.retrieval_metrics",
    "talk2dino.alignment.retrieval.retrieval_ranks",
    "talk2dino.alignment.schedules.constant_with_warmup",
    "talk2dino.alignment.schedules.cosine_with_warmup",
    "talk2dino.evaluation.metrics.mean_iou",
    "talk2dino.evaluation.metrics.mean_iou_metric",
    "talk2dino.evaluation.metrics.per_class_iou",
    "talk2dino.evaluation.metrics.pixel_accuracy",
)
WITHOUT = {
    "talk2dino.__version__": "a text",
    "talk2dino.alignment.similarity.PairedHead": "a base class",
    "talk2dino.alignment.similarity": "a module, whose classes have theirs",
    "talk2dino.alignment.similarity.Similarity": "a base class",
    "talk2dino.segmentation.Segmentation": "what Segmenter's example prints",
}


def examples(path: Path) -> Iterator[doctest.DocTest]:
    """The examples of a file, read and not imported: decorated functions hide theirs from doctest.

    Each docstring starts with nothing defined, so that a reader can paste what stands in it.
    """
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False) or ""
            if ">>>" in text:
                name = getattr(node, "name", path.stem)
                yield parser.get_doctest(text, {}, name, str(path), node.body[0].lineno - 1)


EXAMPLES = [
    pytest.param(example, id=f"{path.relative_to(ROOT).with_suffix('')}:{example.name}")
    for path in sorted((ROOT / "talk2dino").rglob("*.py"))
    for example in examples(path)
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_prints_what_it_says(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Path(str(example.filename)).relative_to(ROOT).with_suffix("")
    try:
        importlib.import_module(".".join(module.parts).removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "talk2dino":
            raise
        pytest.skip(f"needs {error.name}")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    failed = doctest.DocTestRunner().run(example, out=said.append).failed
    assert not failed, "".join(said)


def public_names() -> list[str]:
    listed = [
        f"{package}.{name}"
        for package in PUBLIC
        for name in importlib.import_module(package).__all__
        if f"{package}.{name}" not in WITHOUT
    ]
    return [*listed, *FURTHER]


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_an_example(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found: Any = getattr(importlib.import_module(module), attribute)
    assert ">>> " in (inspect.getdoc(found) or ""), f"{name}: no example in its docstring"


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_example_is_public(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert attribute in importlib.import_module(module).__all__
