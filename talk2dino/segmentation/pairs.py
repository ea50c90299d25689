"""Which image belongs to which label map, found and checked before any long work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from talk2dino.errors import DataError
from talk2dino.features.pictures import is_picture
from talk2dino.segmentation.pictures import is_turned, picture_size


@dataclass(frozen=True)
class Pair:
    """An image and its label map; `name` is the image's path in its folder, without suffix."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """How a dataset's folders are laid out.

    Attributes:
        images: folder of images.
        masks: folder of label maps.
        image_suffix: end of an image's name; None takes any picture.
        mask_suffix: end of a label map's name, in place of `image_suffix`.
        split: file that names the images to take, one per line, without suffix; None takes all.
        recursive: look into subfolders, which are the same in both folders.
    """

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
        _refuse_lone_masks(layout, images)
    else:
        names = _split_names(layout.split)
        _refuse_lone_names(layout, names, images)
    names = names[:limit]
    masks = {name: layout.masks / f"{name}{layout.mask_suffix}" for name in names}
    without = [images[name] for name in names if not masks[name].is_file()]
    if without:
        missing = layout.masks / f"{_name(without[0], layout)}{layout.mask_suffix}"
        raise DataError(
            f"benchmark.masks={layout.masks}: {len(without)} images have no label map, the first "
            f"is {without[0].name}; add {missing.relative_to(layout.masks)}, move the image away, "
            f"or say how label maps end (benchmark.mask_suffix={layout.mask_suffix})"
        )
    return [Pair(name, images[name], masks[name]) for name in names]


def check_pairs(
    pairs: Sequence[Pair],
    max_pixels: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compare all sizes by the files' headers, some thousand files a second.

    Args:
        pairs: images and label maps.
        max_pixels: largest image allowed.
        advance: called with (pairs checked, pairs in all).

    Raises:
        DataError: a file is no picture, a label map has another size than its image, or an image
            is too large.
    """
    for done, pair in enumerate(pairs, 1):
        size = picture_size(pair.image)
        check_size(picture_size(pair.mask), size, pair)
        if size[0] * size[1] > max_pixels:
            raise DataError(
                f"{pair.image}: {size[0]}x{size[1]} pixels, more than benchmark.max_pixels="
                f"{max_pixels}; scale the image and its label map down, or raise that key (a "
                "pixel takes about 70 bytes of memory)"
            )
        advance(done, len(pairs))


def check_size(mask: tuple[int, int], image: tuple[int, int], pair: Pair) -> None:
    """Refuse a label map of another size than its image; sizes are (rows, columns).

    Raises:
        DataError: they differ.
    """
    if mask == image:
        return
    turned = "; it is turned upright by an EXIF tag" if is_turned(pair.image) else ""
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


def _has_suffix(path: Path, suffix: str) -> bool:
    named = path.name.lower().endswith(suffix.lower()) and not path.name.startswith(".")
    return named and path.is_file()


def _name(image: Path, layout: Layout) -> str:
    relative = image.relative_to(layout.images).as_posix()
    return relative[: -len(layout.image_suffix or image.suffix)]


def _split_names(split: Path) -> list[str]:
    if not split.is_file():
        raise DataError(f"benchmark.split={split}: no such file; it names the images to take")
    try:
        lines = split.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"benchmark.split={split}: not a text file ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"benchmark.split={split}: is empty; name one image per line")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"benchmark.split={split}: names {twice} twice; keep one line")
    return names


def _refuse_lone_names(layout: Layout, names: Iterable[str], images: dict[str, Path]) -> None:
    lone = [name for name in names if name not in images]
    if lone:
        suffix = layout.image_suffix or ""
        raise DataError(
            f"benchmark.split={layout.split}: {len(lone)} of its images are missing, the first is "
            f"{lone[0]}{suffix}; add it to {layout.images} or remove the line; names have no suffix"
        )


def _refuse_lone_masks(layout: Layout, images: dict[str, Path]) -> None:
    files = layout.masks.rglob("*") if layout.recursive else layout.masks.iterdir()
    ending = layout.mask_suffix
    names = (
        path.relative_to(layout.masks).as_posix()[: -len(ending)]
        for path in files
        if path.name.endswith(ending) and not path.name.startswith(".")
    )
    lone = sorted(name for name in names if not _belongs(name, images))
    if lone and layout.images != layout.masks:
        raise DataError(
            f"benchmark.images={layout.images}: {len(lone)} label maps have no image, the first is "
            f"{lone[0]}{ending}; add the image, move the label map away, or name the images to "
            "take in a file: benchmark.split=FILE"
        )


def _belongs(name: str, images: Container[str]) -> bool:
    """Whether a label file is an image's, or another file of it such as `X_color.png`."""
    while name not in images:
        name, underscore, _ = name.rpartition("_")
        if not underscore:
            return False
    return True
