"""`Exemplar`: a class shown in a picture instead of said in words.

A folder of them has a folder per class, and in it pictures, each with its mask beside it:
`crack/wall.jpg` and `crack/wall_mask.png`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import check_word, composed, folded
from talk2dino.datasets.label_files import Header, header, read_values, turned_alone
from talk2dino.datasets.pictures import (
    HEIF,
    ImageLike,
    is_picture,
    is_plain,
    orientation,
    to_pixels,
    unread,
    upright,
)
from talk2dino.errors import DataError, check_number, say
from talk2dino.files import user_path

WEIGHT = 0.5
MASK = "_mask"  # ends the name of a mask, before its suffix
_JPEG = b"\xff\xd8"  # how a file begins
_ONE_CHANNEL = "save the mask with one channel, 0 outside the class"


@dataclass(frozen=True, eq=False)
class Exemplar:
    """A picture in which a mask shows what a class looks like.

    Attributes:
        image: as `Talk2DINO.segment` takes it.
        mask: of the same size, 0 outside and anything else inside: a path, or the bytes, of a
            lossless picture with one channel, a PIL image, an array or tensor `[H, W]`.
        weight: share of the exemplars in the vector of a class that has words, too, 0..1; of
            several with different ones the mean. Nothing, where there are no words.

    Raises:
        ConfigError: a weight out of its range.

    Examples:
        >>> import torch
        >>> from talk2dino import Exemplar, Talk2DINO
        >>> from talk2dino.alignment import ProjectionLayer
        >>> from talk2dino.encoders import TimmVisionEncoder
        >>> vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
        >>> model = Talk2DINO(vision, None, ProjectionLayer(8, vision.embed_dim))  # no words
        >>> image = torch.zeros(3, 32, 64, dtype=torch.uint8)
        >>> image[0, :, 32:] = 255
        >>> classes = {"red": Exemplar(image, image[0]), "black": Exemplar(image, image[0] == 0)}
        >>> model.segment(image, classes, short_side=32).labels[16, ::21]
        tensor([1, 1, 0, 0])
    """

    image: ImageLike = field(repr=False)
    mask: ImageLike = field(repr=False)
    weight: float = WEIGHT
    _digest: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0.0, 1.0)

    def settled(self) -> Exemplar:
        """The same in memory, read now and never again: for one that is asked for often.

        Raises:
            DataError: as `read`.
        """
        pixels, inside = self.read()
        made = Exemplar(pixels.clone(), inside, self.weight)
        object.__setattr__(made, "_digest", made.digest)
        return made

    def read(self) -> tuple[Tensor, Tensor]:
        """The picture `[3, H, W]` uint8 and its mask `[H, W]` bool, on the CPU.

        Raises:
            DataError: one of them cannot be read, they differ in size, or the mask is empty.
        """
        pixels, inside = to_pixels(self.image), _read_mask(self.mask)
        size, wanted = tuple(inside.shape), tuple(pixels.shape[-2:])
        if size != wanted:
            turned = size == wanted[::-1] and "; an EXIF tag turns one of them upright"
            raise DataError(
                f"{self._mask_name}: {size[0]}x{size[1]} pixels (rows x columns), but its picture "
                f"has {wanted[0]}x{wanted[1]}; give a mask of the same size{turned or ''}"
            )
        picture, drawn = _header(self.image, wanted), _header(self.mask, size)
        if turned_alone(picture, drawn):
            say(
                f"{self._mask_name}: an EXIF tag turns its picture, and not the mask, which is "
                "taken as drawn on the upright picture",
                stacklevel=2,
            )
        if not inside.any():
            raise DataError(f"{self._mask_name}: is empty; pixels of the class are not 0")
        return pixels, inside

    @property
    def digest(self) -> str:
        """SHA-256 of the pixels, the mask and the weight, hex; errors as `read`."""
        if self._digest is not None:
            return self._digest
        pixels, inside = self.read()
        found = hashlib.sha256(f"{tuple(inside.shape)} {self.weight}".encode())
        found.update(pixels.contiguous().numpy().tobytes())
        found.update(np.packbits(inside.numpy()).tobytes())
        if isinstance(self.image, bytes) and isinstance(self.mask, bytes):  # never others
            object.__setattr__(self, "_digest", found.hexdigest())
        return found.hexdigest()

    @property
    def _mask_name(self) -> str:
        return f"mask={self.mask}" if isinstance(self.mask, (str, Path)) else "mask of an exemplar"


def read_folder(folder: str | Path, weight: float = WEIGHT) -> dict[str, tuple[Exemplar, ...]]:
    """The exemplars of a folder by class; every file is read once.

    Classes are in the order of their names; exemplars in that of their digests, so that no row
    depends on what the files are called, not even by rounding.

    Args:
        folder: holds a folder per class, and that `NAME.jpg` (any kind of picture) and
            `NAME_mask.png` (any lossless kind) in pairs.
        weight: of every exemplar.

    Raises:
        DataError: no such folder, no class in it, a name that is none, a class without pictures or
            masks, a picture or mask without the other, or an exemplar that `Exemplar.read` refuses.
        ConfigError: a weight out of its range.
    """
    root, where = user_path(folder), f"exemplars={folder}"
    check_number("exemplar_weight", weight, 0.0, 1.0)
    if not root.is_dir():
        raise DataError(f"{where}: no such folder; {_LAYOUT}")
    if stray := next((path for path in sorted(root.iterdir()) if is_picture(path)), None):
        raise DataError(f"{where}: {stray.name} lies in no folder of a class; {_LAYOUT}")
    seen = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    if dead := next((path for path in seen if path.is_symlink() and not path.exists()), None):
        raise DataError(f"{where}: {dead.name} is a link that leads nowhere; mend or remove it")
    folders = [path for path in seen if path.is_dir()]
    if not folders:
        raise DataError(f"{where}: holds no folder of a class; {_LAYOUT}")
    found: dict[str, tuple[Exemplar, ...]] = {}
    for one in folders:
        check_word(one.name, f"{where}: a folder")
        name = composed(one.name)
        if name in found:
            raise DataError(f"{where}: two folders are called {name!r}; put them together")
        found[name] = tuple(Exemplar(*pair, weight) for pair in _pairs(one))
    return {name: tuple(sorted(shown, key=lambda one: one.digest)) for name, shown in found.items()}


_LAYOUT = "a folder per class holds pictures and masks: crack/wall.jpg with crack/wall_mask.png"


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures of a class and their masks; names that differ in upper case alone are one."""
    where = f"exemplars={folder.parent}: {folder.name}"
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            raise DataError(f"{where}/{path.name} is a folder, in which nothing is read; {_LAYOUT}")
        if not is_picture(path) and path.suffix.lower() in HEIF:
            raise DataError(f"{where}/{path.name}: {unread([path.suffix.lower()])}")
    files = [path for path in sorted(folder.iterdir()) if is_picture(path)]
    masks: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: -len(path.stem)):  # X_mask may have X_mask_mask
        if path.stem.lower().endswith(MASK) and path.stem not in masks:
            masks[path.stem[: -len(MASK)]] = path
    pictures = [path for path in files if path not in masks.values()]
    if not pictures or not masks:
        raise DataError(f"{where} holds no {'masks' if pictures else 'pictures'}; {_LAYOUT}")
    found = [(path, _mask_of(path, masks)) for path in pictures]
    taken = [name for _, name in found]
    for path, name in found:
        if name is None or taken.count(name) > 1:
            wanted = f"needs a mask of its own, {path.stem}{MASK}.png"
            raise DataError(f"{where}/{path.name} {wanted}")
    if alone := sorted(masks.keys() - set(taken)):
        raise DataError(f"{where}/{masks[alone[0]].name} has no picture {alone[0]}.jpg beside it")
    return [(path, masks[str(name)]) for path, name in found]


def _mask_of(picture: Path, masks: Iterable[str]) -> str | None:
    """The name of a picture's mask: its own, or the only one but for upper case and accents."""
    if picture.stem in masks:
        return picture.stem
    same = [name for name in masks if folded(name) == folded(picture.stem)]
    return same[0] if len(same) == 1 else None


def say_confused(classes: Mapping[str, Sequence[Any]]) -> None:
    """Say where a class that is shown has a name that another class says, or nearly.

    Args:
        classes: by name, words and exemplars.
    """
    for name, entries in classes.items():
        if any(isinstance(entry, Exemplar) for entry in entries):
            for other, words in classes.items():
                said = (other, *(word for word in words if isinstance(word, str)))
                near = next((word for word in said if folded(word) == folded(name)), None)
                if other != name and near:
                    say(
                        f"classes: {name!r} is shown, and {near!r} stands for another class, "
                        f"{other!r}; one name in both makes them one class",
                        stacklevel=3,
                    )
                    break


def _read_mask(mask: ImageLike) -> Tensor:
    """`[H, W]` bool on the CPU."""
    if isinstance(mask, (str, Path)):
        path = user_path(mask)
        if not path.is_file():
            raise DataError(f"mask={mask}: no such file")
        with suppress(OSError), path.open("rb") as file:
            _refuse_jpeg(file, f"mask={mask}")
        values = read_values(path, _ONE_CHANNEL, f"mask={mask}")
        with Image.open(path) as opened:
            values = _by_color(values, opened)
    elif isinstance(mask, bytes):
        _refuse_jpeg(BytesIO(mask), "mask of an exemplar")
        values = read_values(BytesIO(mask), _ONE_CHANNEL, "mask of an exemplar")
        with Image.open(BytesIO(mask)) as opened:
            values = _by_color(values, opened)
    elif isinstance(mask, Image.Image):
        mask = upright(mask)
        values = _by_color(np.asarray(mask), mask)
    elif isinstance(mask, Tensor) and is_plain(mask):
        whole = mask.detach().cpu()
        values = (whole.float() if whole.is_floating_point() else whole).numpy()
    else:
        values = np.asarray(mask if isinstance(mask, np.ndarray) else None)
    if values.ndim != 2 or values.dtype.kind not in "buif" or np.isnan(values).any():
        raise DataError(
            f"mask of an exemplar: {values.dtype} {values.shape}; give [H, W], 0 outside the class"
        )
    found = np.unique(values)
    name = f"mask={mask}" if isinstance(mask, (str, Path)) else "mask of an exemplar"
    if len(found) > 1 and 0 not in found:
        raise DataError(
            f"{name}: holds {found[0]:g} and {found[1]:g} and no 0, so all of the picture would be "
            "the class; pixels outside are 0"
        )
    if len(found) > 2:
        shown = ", ".join(f"{value:g}" for value in found[:4])
        said = f"{name}: holds {len(found)} values ({shown}, …); all but 0 are the class"
        say(said, stacklevel=2)
    return torch.from_numpy(values != 0)


def _header(image: ImageLike, size: tuple[int, ...]) -> Header:
    """How it is stored; arrays and tensors, `size` rows and columns, have no EXIF tag."""
    if isinstance(image, (str, Path)):
        return header(user_path(image))
    if isinstance(image, bytes):
        return header(BytesIO(image))
    if isinstance(image, Image.Image):
        turned = orientation(image) is not None
        return Header(image.format, (size[0], size[1]), image.size, turned)
    return Header(None, (size[0], size[1]), (size[1], size[0]), False)


def _refuse_jpeg(file: BinaryIO, name: str) -> None:
    if file.read(2) == _JPEG:
        raise DataError(f"{name}: JPEG changes pixels; save the mask as PNG")


def _by_color(values: NDArray[Any], picture: Image.Image) -> NDArray[Any]:
    """Where a palette picture is not black, if black is in it under another number than 0."""
    palette = picture.getpalette() if picture.mode == "P" else None
    if palette is None or not any(palette[:3]):
        return values
    black = [n for n in np.unique(values).tolist() if not any(palette[3 * n : 3 * n + 3] or [1])]
    return values != black[0] if len(black) == 1 else values


def mix(text: Tensor, shown: Tensor, exemplars: Sequence[Exemplar]) -> Tensor:
    """A row `[D]` of words and that of exemplars, by the exemplars' weight, of unit length."""
    weight = sum(exemplar.weight for exemplar in exemplars) / len(exemplars)
    return F.normalize(torch.lerp(text, shown, weight), dim=0)
