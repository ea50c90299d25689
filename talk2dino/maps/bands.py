"""Which bands of a file are red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from talk2dino.errors import ConfigError, DataError, say


def chosen_bands(file: Any, given: Sequence[int] | None) -> list[int]:
    """Checked numbers of one or three bands of an open file, counted from 1.

    Args:
        file: of rasterio.
        given: None takes those that the file calls red, green and blue, else the first three, or
            the first; what is left out or guessed then is said.

    Raises:
        ConfigError: another number of bands, or some that the file does not have.
        DataError: a color table, complex numbers, or bands of several types.
    """
    from rasterio.enums import ColorInterp

    name = f"image={file.name}"
    found = list(given) if given else _colored(file, name)
    if len(found) not in (1, 3) or not all(
        isinstance(n, int) and 1 <= n <= file.count for n in found
    ):
        raise ConfigError(
            f"bands={found}: give three bands or one of {file.name}, which has {file.count}"
        )
    if file.colorinterp[found[0] - 1] == ColorInterp.palette:
        raise DataError(f"{name}: has a color table; expand it first: gdal_translate -expand rgb")
    kinds = {file.dtypes[number - 1] for number in found}
    if any(kind.startswith("complex") for kind in kinds):
        raise DataError(f"{name}: holds complex numbers; give a file of intensities")
    if len(kinds) > 1:
        raise DataError(
            f"{name}: bands {found} are of types {', '.join(sorted(kinds))}; bring them to one: "
            "gdal_translate -ot UInt16"
        )
    return found


def _colored(file: Any, name: str) -> list[int]:
    """The bands of a file for which none are given."""
    from rasterio.enums import ColorInterp

    kinds = list(file.colorinterp)
    wanted = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if all(kinds.count(kind) == 1 for kind in wanted):
        return [kinds.index(kind) + 1 for kind in wanted]
    shown = [number for number, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
    found = shown[:3] if len(shown) >= 3 else shown[:1]
    if len(shown) > len(found):
        taken = "red, green and blue" if len(found) == 3 else "gray"
        say(
            f"{name}: holds {len(shown)} bands and does not say their colors; {found} are taken as "
            f"{taken}; bands=[R,G,B] or [GRAY] says which"
        )
    return found or [1]
