"""Which label map belongs to which image, and what can be said of both before any pixel is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from talk2dino.datasets.benchmarks.classes import folded
from talk2dino.datasets.label_files import header, turned_alone
from talk2dino.datasets.pictures import is_picture, is_there
from talk2dino.errors import Advance, DataError, say
from talk2dino.files import read_text


@dataclass(frozen=True)
class Pair:
    """An image and its label map; `name` is the image's path in its folder, without suffix."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """How a dataset's folders are laid out; see the attributes of `FolderBenchmark`."""

    images: Path
    masks: Path
    image_suffix: str | None = None
    mask_suffix: str = ".png"
    split: Path | None = None
    recursive: bool = False


def find_pairs(layout: Layout, limit: int | None = None) -> list[Pair]:
    """Every image with its label map, in the order of the split file or of the names.

    Args:
        layout: of the folders.
        limit: only the first ones.

    Raises:
        DataError: a folder or the split file is missing or empty, two images of one name, an
            image without label map, a label map without image (unless a split file chooses), or a
            split file that names a missing image.
    """
    for key, folder in (("images", layout.images), ("masks", layout.masks)):
        if not folder.is_dir():
            raise DataError(
                f"benchmark.{key}={folder}: no such folder; put or link the dataset there, or say "
                "where it is with benchmark.root=DIR (data/README.md shows the layouts)"
            )
    images = _listed(layout.images, layout.image_suffix, layout.recursive, "images")
    if layout.split is None:
        names = sorted(images)
        _check_masks_have_images(layout, images)
        if not layout.recursive and (below := _below(layout.images, layout.image_suffix)):
            say(
                f"benchmark.images={layout.images}: {below.relative_to(layout.images)} and what "
                "else lies in subfolders is left out; benchmark.recursive=true takes it"
            )
    else:
        names = _split_names(layout.split)
        _check_names_have_images(layout, names, images)
    names = names[:limit]
    masks = _masks(layout, names)
    without = [name for name in names if not masks[name].is_file()]
    if without:
        first, ending = without[0], layout.mask_suffix
        raise DataError(
            f"benchmark.masks={layout.masks}: {len(without)} images have no label map, the first "
            f"is {images[first].name}; add {first}{ending}, move the image away, or say how label "
            f"maps end (benchmark.mask_suffix={ending})"
        )
    return [Pair(name, images[name], masks[name]) for name in names]


def _masks(layout: Layout, names: Sequence[str]) -> dict[str, Path]:
    """The label map of every image: of its name, or the only one but for upper case and accents."""
    masks = {name: layout.masks / f"{name}{layout.mask_suffix}" for name in names}
    absent = [name for name in names if not masks[name].is_file()]
    if absent:
        taken, there = set(masks.values()), defaultdict(list)
        for path in layout.masks.rglob("*") if layout.recursive else layout.masks.iterdir():
            if path not in taken and path.is_file():
                there[folded(path.relative_to(layout.masks).as_posix())].append(path)
        wanted = Counter(folded(name) for name in absent)
        for name in absent:
            found = there[folded(f"{name}{layout.mask_suffix}")]
            if len(found) == wanted[folded(name)] == 1:
                masks[name] = found[0]
    return masks


def check_pairs(
    pairs: Sequence[Pair],
    max_pixels: int,
    advance: Advance = lambda done, total: None,
) -> None:
    """Compare all sizes by the files' headers, some thousand files a second.

    Args:
        pairs: images and label maps.
        max_pixels: largest image allowed.
        advance: called with (pairs checked, pairs in all).

    Raises:
        DataError: a file is no picture, a label map has another size than its image or is a JPEG,
            or an image is too large.
    """
    turned = []
    for done, pair in enumerate(pairs, 1):
        image, mask = header(pair.image), header(pair.mask)
        if mask.format in ("JPEG", "MPO"):
            raise DataError(f"{pair.mask}: JPEG changes values; save the label map as PNG")
        check_size(mask.size, image.size, pair)
        rows, columns = image.size
        if rows * columns > max_pixels:
            raise DataError(
                f"{pair.image}: {rows}x{columns} pixels, more than benchmark.max_pixels="
                f"{max_pixels}; scale the image and its label map down, or raise that key (a "
                "pixel takes about 70 bytes of memory)"
            )
        if turned_alone(image, mask):
            turned.append(pair.image.name)
        advance(done, len(pairs))
    if turned:
        say(
            f"{pairs[0].image.parent}: EXIF tags turn {len(turned)} images and not their label "
            f"maps, the first is {turned[0]}; these are taken as drawn on the upright image"
        )


def check_size(mask: tuple[int, int], image: tuple[int, int], pair: Pair) -> None:
    """Refuse a label map of another size, (rows, columns), than its image (DataError)."""
    if mask == image:
        return
    turned = "; it is turned upright by an EXIF tag" if header(pair.image).turned else ""
    raise DataError(
        f"{pair.mask}: {mask} rows and columns, its image {pair.image.name} has {image}{turned}; "
        "export the label map at the image's size"
    )


def _listed(folder: Path, suffix: str | None, recursive: bool, key: str) -> dict[str, Path]:
    """Files by their path below the folder without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if not (_has_suffix(path, suffix) if suffix else is_picture(path)):
            continue
        relative = path.relative_to(folder).as_posix()
        name = relative[: -len(suffix or path.suffix)]
        if name in found:
            raise DataError(
                f"benchmark.{key}={folder}: {found[name].name} and {path.name} share one label "
                "map; keep one, or set benchmark.image_suffix"
            )
        found[name] = path
    if not found:
        wanted = f"no file ends in {suffix}" if suffix else "no images in this folder"
        raise DataError(f"benchmark.{key}={folder}: {wanted}")
    return found


def _below(folder: Path, suffix: str | None) -> Path | None:
    """An image in a folder of this one that is not hidden."""
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            for path in inner.iterdir():
                if _has_suffix(path, suffix) if suffix else is_picture(path):
                    return path
    return None


def _has_suffix(path: Path, suffix: str) -> bool:
    named = path.name.lower().endswith(suffix.lower()) and not path.name.startswith(".")
    return named and is_there(path)


def _split_names(split: Path) -> list[str]:
    if not split.is_file():
        raise DataError(f"benchmark.split={split}: no such file; it names the images to take")
    names = [line.strip() for line in read_text(split).splitlines() if line.strip()]
    if not names:
        raise DataError(f"benchmark.split={split}: is empty; name one image per line")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"benchmark.split={split}: names {twice} twice; keep one line")
    return names


def _check_names_have_images(layout: Layout, names: Iterable[str], images: dict[str, Path]) -> None:
    missing = [name for name in names if name not in images]
    if missing:
        first = f"{missing[0]}{layout.image_suffix or ''}"
        raise DataError(
            f"benchmark.split={layout.split}: {len(missing)} of its images are missing, the first "
            f"is {first}; add it to {layout.images} or remove the line; names have no suffix"
        )


def _check_masks_have_images(layout: Layout, images: dict[str, Path]) -> None:
    files = layout.masks.rglob("*") if layout.recursive else layout.masks.iterdir()
    ending = layout.mask_suffix
    names = (
        path.relative_to(layout.masks).as_posix()[: -len(ending)]
        for path in files
        if path.name.endswith(ending) and not path.name.startswith(".")
    )
    alike = set(map(folded, images))
    others = sorted(
        name for name in names if not _belongs(name, images) and not _belongs(folded(name), alike)
    )
    if others and layout.images != layout.masks:
        raise DataError(
            f"benchmark.images={layout.images}: {len(others)} label maps have no image, the first "
            f"is {others[0]}{ending}; add the image, move the label map away, or name the images "
            "to take in a file: benchmark.split=FILE"
        )


def _belongs(name: str, images: Container[str]) -> bool:
    """Whether a label file is an image's, or another file of it such as `X_color.png`."""
    while name not in images:
        name, underscore, _ = name.rpartition("_")
        if not underscore:
            return False
    return True
