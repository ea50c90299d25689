"""`python -m talk2dino`: what commands there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

# along the data's way; commands that are not named here come after these
ORDER = ("extract", "train", "evaluate", "compare", "segment", "app", "export", "convert", "doctor")


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


def main() -> None:
    """Print the list."""
    print("python -m talk2dino.<command> --help explains a command and its keys.\n")
    listed = commands()
    width = max(map(len, listed))
    for name, line in listed.items():
        print(f"  {name:<{width}}  {line.rstrip('.')}")
    print(
        "\nNew here? `make quickstart` trains and segments in minutes; `python -m talk2dino.doctor`"
    )
    print("says what is installed, and docs/get-started.md is the place to begin.")


if __name__ == "__main__":
    main()
