"""`talk2dino COMMAND …` is `python -m talk2dino.COMMAND …`; alone it lists the commands."""

from __future__ import annotations

import ast
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import talk2dino

# along the data's way; commands that are not named here come after these
ORDER = (
    *("extract", "train", "calibrate", "evaluate", "compare", "segment", "video", "map"),
    *("search", "app", "serve", "embed", "export", "convert", "doctor"),
)


def commands() -> dict[str, str]:
    """Every `python -m talk2dino.<name>` and the line that its module says of itself.

    The modules are read, not imported, so that the answer comes at once.
    """
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and '__name__ == "__main__"' in source:
            line = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
            found[path.stem] = re.sub(r"^`[^`]*`: ", "", line)
    rank = {name: place for place, name in enumerate(ORDER)}
    return {name: found[name] for name in sorted(found, key=lambda n: (rank.get(n, len(rank)), n))}


def overview(listed: Mapping[str, str]) -> str:
    """What `--help` prints: each command with its line."""
    width = max(map(len, listed))
    lines = [f"  {name:<{width}}  {line.rstrip('.')}" for name, line in listed.items()]
    return "\n".join(
        [
            "talk2dino COMMAND … is python -m talk2dino.COMMAND …; --version prints the version\n",
            *lines,
            "\ntalk2dino COMMAND --help explains a command and its keys.",
            "New here? `make quickstart` trains and segments in minutes, `talk2dino doctor`",
            "says what is installed, and docs/get-started.md is the place to begin.",
        ]
    )


def unknown_command(name: str, listed: Mapping[str, str]) -> str:
    """One line about a command that does not exist."""
    near = difflib.get_close_matches(name, listed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(listed)}"
    return f"error: talk2dino {name}: no such command; {hint}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the command that the first argument names, or print what there is.

    This process is replaced by `python -m talk2dino.COMMAND …`, instead of running the module
    inside it: the search path, `sys.argv` and the spec of `__main__` are then those of `python -m`.
    DDP, joblib and multiprocessing start further processes by them.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    listed = commands()
    if name in ("-h", "--help"):
        print(overview(listed))
    elif name == "--version":
        print(f"talk2dino {talk2dino.__version__}")
    elif name in listed:
        os.execv(sys.executable, [sys.executable, "-m", f"talk2dino.{name}", *given[1:]])
    else:
        print(unknown_command(name, listed), file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
