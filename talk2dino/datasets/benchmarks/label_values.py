"""From what a label file stores, values or colors, to class indices.

mmsegmentation does it in three steps (`LoadAnnotations`: `label_map`, then `reduce_zero_label`;
then `ignore_index` in the metric). Here they are one table, looked up once per image. Values that
are no class are refused: mmsegmentation lets them add to the union of what was predicted there,
which happens only with a wrong class list or unconverted files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import MAX_VALUE, ClassList, Color, read_color
from talk2dino.errors import ConfigError, DataError

_NONE = -1


class LabelValues:
    """Single-channel label files: pixel values are classes.

    Args:
        classes: names and values.
        ignore_index: stored value that does not count, and its value in the result.
        reduce_zero_label: stored 0 does not count, and all other values are one higher than in
            the class list (ADE20K, VOC and Pascal Context without background).
        label_map: stored value to the value meant, applied first; None refuses a value, and values
            that are not named stay as they are.

    Raises:
        ConfigError: the ignored value is also a class, or an impossible map.
    """

    def __init__(
        self,
        classes: ClassList,
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
        label_map: Mapping[int, int | None] | None = None,
    ) -> None:
        shift = int(reduce_zero_label)
        table = np.full(MAX_VALUE + 2, _NONE, np.int64)
        values = [spec.value + shift for spec in classes.classes]
        if ignore_index in values or not len(classes.classes) <= ignore_index <= MAX_VALUE:
            raise ConfigError(
                f"benchmark.ignore_index={ignore_index} is also a class; choose a value above the "
                f"{len(classes.classes)} classes and none of their label values"
            )
        table[ignore_index] = ignore_index
        table[[value + shift for value in classes.unlabeled]] = ignore_index
        if reduce_zero_label:
            table[0] = ignore_index
        table[values] = np.arange(len(values))
        before = table.copy()
        for stored, meant in dict(label_map or {}).items():
            table[_value(stored)] = _NONE if meant is None else before[_value(meant)]
        self._table = table

    def targets(self, stored: NDArray[Any], name: str = "label map") -> Tensor:
        """Class indices of a label map.

        Args:
            stored: [H, W] of any integer type, or bool; not written to.
            name: file, for the message.

        Returns:
            [H, W] int64, `0..K-1` and `ignore_index`.

        Raises:
            DataError: a value is neither a class nor ignored.
        """
        if stored.dtype in (np.uint8, np.uint16, np.bool_):
            target = self._table[stored.astype(np.int32)]
        else:  # signed and 32-bit files may hold anything
            inside = np.clip(stored, 0, MAX_VALUE)
            target = np.where(stored == inside, self._table[inside], _NONE)
        unknown = target == _NONE
        if unknown.any():
            found = [int(value) for value in np.unique(stored[unknown])]
            listed = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            raise DataError(
                f"{name}: label value {listed} is no class of benchmark.classes; add the class, "
                "list it under unlabeled, or convert the file (benchmark.label_map, "
                "benchmark.reduce_zero_label)"
            )
        return torch.from_numpy(target)


class LabelColors:
    """Colored label files: every class has a color.

    Args:
        colors: of the classes, in index order.
        ignored: colors that do not count.
        ignore_index: their value in the result.

    Raises:
        ConfigError: one color stands for two things.
    """

    def __init__(
        self, colors: Sequence[Color], ignored: Sequence[Color] = (), ignore_index: int = 255
    ) -> None:
        known = [*colors, *ignored]
        twice = next((color for color in known if known.count(color) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"benchmark.palette: the color {list(twice)} stands for two classes; give every "
                "class and every ignored color its own"
            )
        packed = _pack(np.array(known, np.uint8))
        meaning = np.array([*range(len(colors)), *[ignore_index] * len(ignored)], np.int64)
        order = np.argsort(packed)
        self._packed, self._meaning = packed[order], meaning[order]

    def targets(self, stored: NDArray[np.uint8], name: str = "label map") -> Tensor:
        """Class indices [H, W] int64 of a label picture [H, W, 3] uint8 RGB.

        Raises:
            DataError: a color that is neither a class's nor ignored.
        """
        pixels = _pack(stored)
        index = np.searchsorted(self._packed, pixels).clip(max=len(self._packed) - 1)
        unknown = self._packed[index] != pixels
        if unknown.any():
            raise DataError(
                f"{name}: the color {stored[unknown][0].tolist()} is no class of "
                "benchmark.palette; add it there, or under benchmark.ignore_colors"
            )
        return torch.from_numpy(self._meaning[index])


def class_colors(classes: ClassList, palette: Any) -> list[Color]:
    """The colors of the classes, in index order.

    Args:
        classes: the class list.
        palette: `"classes"` takes the list's own colors, else a color per class: `[r, g, b]` or
            `"#rrggbb"`.

    Raises:
        ConfigError: a class without color, or another number of colors than classes.
    """
    if palette == "classes":
        without = [spec.name for spec in classes.classes if spec.color is None]
        if without:
            raise ConfigError(
                f"benchmark.palette=classes: {len(without)} classes have no color, the first is "
                f"{without[0]}; add one in benchmark.classes or list all in benchmark.palette"
            )
        return [spec.color for spec in classes.classes if spec.color is not None]
    colors = list_colors(palette, "benchmark.palette")
    if len(colors) != len(classes.classes):
        raise ConfigError(
            f"benchmark.palette: {len(colors)} colors for {len(classes.classes)} classes; give "
            "one per class, in the order of benchmark.classes"
        )
    return colors


def list_colors(given: Any, key: str) -> list[Color]:
    """A list of colors, see `read_color`.

    Raises:
        ConfigError: no list.
        DataError: something in it is no color.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f'{key}={given!r}: give a list of colors [r, g, b] or "#rrggbb"')
    return [read_color(color, f"{key}: entry {number}") for number, color in enumerate(given)]


def _pack(colors: NDArray[np.uint8]) -> NDArray[np.int32]:
    """[…, 3] to […], one number per color."""
    wide = colors.astype(np.int32)
    packed: NDArray[np.int32] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return packed


def _value(given: Any) -> int:
    if type(given) is not int or not 0 <= given <= MAX_VALUE:
        raise ConfigError(
            f"benchmark.label_map holds {given!r}; give whole numbers 0..{MAX_VALUE}, as in "
            "{7: 0, 8: 1}"
        )
    return given
