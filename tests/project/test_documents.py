"""Every command of the documents: run, or composed and checked where its data is not here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from talk2dino.config.checks import check_targets, config_folder
from talk2dino.config.quoting import quote_overrides
from talk2dino.config.schemas import SCHEMAS, register_schema
from tests.helpers.hub import Hub
from tests.helpers.pipeline import COMMAND, run_line, run_script

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (\w+) -->\s*)?^( *)```(bash|python)\n(.*?)^ *```", re.M | re.S)


class Block(NamedTuple):
    """A code block of a document."""

    where: str
    mode: str
    language: str
    code: str


def blocks() -> list[Block]:
    found = []
    for document in [*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md"]:
        text = document.read_text()
        for match in BLOCK.finditer(text):
            mode, _, language, code = match.groups()
            line = text[: match.start(3)].count("\n") + 1
            where = f"{document.name}:{line}"
            found.append(Block(where, mode or "", language, textwrap.dedent(code)))
    return found


def chosen(mode: str, language: str) -> list[object]:
    return [
        pytest.param(block, id=block.where)
        for block in blocks()
        if (block.mode, block.language) == (mode, language)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", chosen("run", "bash"))
def test_shell_block_runs(block: Block, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.parents[1])
    run_script(block.code)


@pytest.mark.slow
@pytest.mark.parametrize("block", chosen("run", "python"))
def test_python_block_runs(block: Block, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.parents[1])
    Path("out").mkdir(exist_ok=True)
    exec(compile(block.code, block.where, "exec"), {})


@pytest.mark.slow
def test_blocks_run_on_the_hub(
    released: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a local server that has a model of the released shapes, in the order of the page."""
    hub.serve(released)
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((120, 120)).save("photo.jpg")
    found = [block for block in blocks() if block.mode == "hub"]
    assert {block.language for block in found} == {"bash", "python"}
    for block in found:
        if block.language == "python":
            exec(compile(block.code, block.where, "exec"), {})
        for line in COMMAND.findall(block.code):
            run_line(line)


@pytest.mark.slow
@pytest.mark.parametrize("block", chosen("torchless", "python"))
def test_python_block_runs_without_torch(block: Block, quickstart: Path) -> None:
    """What exported files need: neither PyTorch nor this package can be imported."""
    absent = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'talk2dino')))\n"
    command = [sys.executable, "-c", absent + block.code]
    done = subprocess.run(command, cwd=quickstart.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("block", chosen("compose", "bash"))
def test_command_composes(block: Block) -> None:
    commands = block.code.replace("\\\n", " ").strip().splitlines()
    assert commands
    for command in commands:
        python, flag, module, *overrides = shlex.split(command, comments=True)
        assert (python, flag) == ("python", "-m")
        name = module.removeprefix("talk2dino.")
        overrides = quote_overrides(overrides, SCHEMAS.get(name))
        register_schema(name)
        if name == "convert":  # its first word is the task
            overrides[0] = f"task={overrides[0]}"
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            # the store's, which a command may name as well: the last word counts
            widths = ["projection.text_dim=384", "projection.vision_dim=768"]
            for job in jobs(overrides):
                given = [*widths, *job] if name == "train" else job
                check_targets(hydra.compose(name, given, return_hydra_config=False))


def jobs(overrides: list[str]) -> list[list[str]]:
    """Overrides of as few jobs of a sweep (-m) as show every value; else the overrides alone."""
    if overrides[:1] != ["-m"]:
        return [overrides]
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in OverridesParser.create().parse_overrides(overrides[1:])
    ]
    return [[c[job % len(c)] for c in choices] for job in range(max(map(len, choices)))]


def test_every_block_has_a_mode() -> None:
    """A block without a mode may hold nothing but `make`, which CI itself runs."""
    for block in blocks():
        if block.mode not in ("run", "torchless", "compose", "hub"):
            for line in filter(None, block.code.splitlines()):
                known = ("make ", "python benchmarks/")
                assert line.startswith(known), f"{block.where}: nobody runs `{line}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        # Pages below reference/ are made when the site is built, which checks links to them.
        if "://" not in target and not target.startswith("reference/"):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
