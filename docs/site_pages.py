"""Pages of the documentation site that are made from other files, when the site is built.

The home page is README.md, the changelog is CHANGELOG.md, and the reference of all configs is
`conf/` itself: each file's own comments explain its keys. mkdocs.yml names this file under `hooks`.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "talk2dino"
COMMANDS = ("extract", "train", "evaluate", "segment", "map", "search", "convert")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    pages = {
        "index.md": from_root((REPOSITORY / "README.md").read_text()),
        "changelog.md": from_root((REPOSITORY / "CHANGELOG.md").read_text()),
        "contributing.md": from_root((REPOSITORY / "CONTRIBUTING.md").read_text()),
        "reference/config.md": config_reference(REPOSITORY / "conf"),
    }
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        name = "config-package" if folder.name == "config" else folder.name  # config.md: of conf/
        pages[f"reference/{name}.md"] = api_reference(folder)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def from_root(text: str) -> str:
    """A page of the repository's root as a page of docs/: links lose their folder."""
    text = text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    return text.replace("](CONTRIBUTING.md)", "](contributing.md)")


def config_reference(conf: Path) -> str:
    """One page with the keys of every command, then every group with all of its options."""
    parts = [
        "# Configuration reference",
        "Generated from `conf/`. `group=option` on the command line chooses a file, "
        "`key.below=value` changes a value, and `--cfg job` prints what a command would run with.",
        "## Commands",
    ]
    for command in COMMANDS:
        file = conf / f"{command}.yaml"
        parts += [f"### `python -m talk2dino.{command}`", help_text(file), listing(own_keys(file))]
    parts.append("## Groups")
    for folder in sorted(path for path in conf.rglob("*") if path.is_dir()):
        options = sorted(folder.glob("*.yaml"))
        if options:
            parts.append(f"### {folder.relative_to(conf).as_posix()}")
        for option in options:
            parts += [f"#### `{option.stem}`", listing(option.read_text())]
    return "\n\n".join(part for part in parts if part) + "\n"


def api_reference(folder: Path) -> str:
    """A page with the docstrings of every module of a package."""
    files = sorted(file for file in folder.rglob("*.py") if file.stem != "__init__")
    modules = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    title = f"# {PACKAGE.name}.{folder.name}"
    return "\n\n".join([title, *(f"::: {module}" for module in modules)]) + "\n"


def own_keys(file: Path) -> str:
    """A command's config without Hydra's own node, which says where outputs go and prints help."""
    return re.split(r"^hydra:", file.read_text(), maxsplit=1, flags=re.M)[0]


def help_text(file: Path) -> str:
    """What `--help` of the command prints."""
    hydra = yaml.safe_load(file.read_text()).get("hydra", {})
    text = str(hydra.get("help", {}).get("template", ""))
    before, _, after = text.partition("Groups (group=option)")
    examples = after.partition("$APP_CONFIG_GROUPS")[2]
    return f"```text\n{before.rstrip()}\n{examples.rstrip()}\n```"


def listing(text: str) -> str:
    """YAML as a code block."""
    return f"```yaml\n{text.strip()}\n```"
