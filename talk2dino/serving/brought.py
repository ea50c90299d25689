"""Exemplars that a request brings: a name, a picture and a mask each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from talk2dino.datasets.benchmarks.classes import check_word, composed
from talk2dino.errors import DataError, check_number
from talk2dino.inference.exemplars import Exemplar


def brought_exemplars(
    names: Sequence[str], images: Sequence[bytes], masks: Sequence[bytes], weight: float
) -> dict[str, tuple[Exemplar, ...]]:
    """The exemplars of a request by class; `names`, `images` and `masks` go together.

    Raises:
        DataError: not as many of each, or a name that is none.
        ConfigError: a weight out of its range.
    """
    check_number("exemplar_weight", weight, 0.0, 1.0)
    counts = f"{len(names)} exemplar_classes, {len(images)} exemplar_images, {len(masks)}"
    if not len(names) == len(images) == len(masks):
        raise DataError(f"{counts} exemplar_masks: give a picture and a mask for each name")
    found: dict[str, tuple[Exemplar, ...]] = {}
    for name, image, mask in zip(map(composed, names), images, masks, strict=True):
        check_word(name, "exemplar_classes")
        found[name] = (*found.get(name, ()), Exemplar(image, mask, weight))
    return found


def numbered(exemplars: Mapping[str, tuple[Exemplar, ...]]) -> Iterator[tuple[str, Exemplar]]:
    """What messages call them, one by one."""
    for name, several in exemplars.items():
        for number, one in enumerate(several, 1):
            yield f"exemplar {number} of {name!r:.60}", one


def read_all(brought: Sequence[tuple[str, Exemplar]]) -> None:
    """Read them once, so that what is wrong names the exemplar."""
    for name, exemplar in brought:
        try:
            exemplar.digest  # noqa: B018  # reads picture and mask, and is kept
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
