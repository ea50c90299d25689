"""Pictures of a segmentation: colors over the image, a legend below, label maps as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import BACKGROUND, Color
from talk2dino.errors import DataError
from talk2dino.files import replacing

MARK = "talk2dino"  # in the PNG field `Software`
FIRST = (230, 70, 60)
STRIP = 1 << 20  # pixels that are mixed at once: 100 MB
HEAT = ((20, 20, 70), (110, 30, 120), (210, 60, 80), (250, 150, 50), (252, 245, 150))
PAPER, INK, FAINT, SWATCH = (255, 255, 255), (33, 37, 41), (134, 142, 150), (222, 226, 230)


def ignored_label(classes: int) -> int:
    """The label of pixels without a class: 255, or 65535 where 255 is one of the classes."""
    return 255 if classes <= 255 else 65535


def default_palette(count: int) -> list[Color]:
    """`count` colors, each as far as possible from all before it.

    Farthest-point choice in OKLab (Ottosson 2020), where distance is what the eye sees, among
    colors that are neither pale, dark nor neon. A longer palette begins with the shorter one.
    """
    levels = range(0, 256, 15)
    rgb = np.array(list(product(levels, levels, levels)))
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (chroma > 0.09) & (chroma < 0.22) & (lab[:, 0] > 0.45) & (lab[:, 0] < 0.88)
    rgb, lab = rgb[vivid], lab[vivid]
    lab[:, 0] *= 0.7  # hue tells areas apart better than lightness, which the image brings along
    chosen = [int(np.abs(rgb - FIRST).sum(1).argmin())]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while len(chosen) < min(count, len(rgb)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    colors = [(int(r), int(g), int(b)) for r, g, b in rgb[chosen]]
    return [colors[i % len(colors)] for i in range(count)]


def _oklab(rgb: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """OKLab `[N, 3]` of sRGB 0..255 `[N, 3]`; matrices as published."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lab: npt.NDArray[np.float64] = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return lab


def overlay(
    image: Image.Image,
    labels: Tensor,
    classes: Sequence[str],
    palette: Sequence[Color] | None = None,
    alpha: float = 0.55,
    legend: bool = True,
) -> Image.Image:
    """Lay class colors over a picture.

    Areas get a thin bright outline, so neighbors stay apart on any picture. The legend stands
    on its own strip below and lists the classes that appear, largest first, with their share.

    Args:
        image: the picture, any mode.
        labels: `[H, W]` integers, index into `classes`; `ignored_label` stays uncolored.
        classes: names.
        palette: one RGB triple 0..255 per class; without it `default_palette`, and a class
            named "background" stays uncolored.
        alpha: opacity of the colors, 0..1.
        legend: add the strip.

    Returns:
        RGB picture of the image's size, plus the strip.

    Raises:
        DataError: sizes differ, a label has no class, or the palette is too short.
    """
    index = labels.cpu().numpy().astype(np.int64, copy=False)
    if index.shape != (image.height, image.width):
        raise DataError(
            f"labels {index.shape} do not fit the image of {image.height}x{image.width} pixels"
        )
    ignored = ignored_label(len(classes))
    low = int(index.min(initial=0))
    high = int(index.max(where=index != ignored, initial=0))
    if not 0 <= low <= high < max(len(classes), 1):
        raise DataError(f"labels {low}..{high} need more than {len(classes)} class names")
    counts = np.bincount(index.ravel())[: len(classes)]
    shown = [int(k) for k in counts.nonzero()[0]]
    colors = np.array(legend_colors(classes, palette))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    plain = [ignored]
    if palette is None and BACKGROUND in classes:
        plain.append(list(classes).index(BACKGROUND))
    edge = _outline(index, max(1, min(index.shape) // 400)) & (alpha > 0)
    for rows in _strips(index.shape):
        pixels[rows] = _mixed(pixels[rows], index[rows], edge[rows], plain, colors, alpha)
    picture = Image.fromarray(pixels)
    if not legend or not shown:
        return picture
    shares = [(k, float(counts[k] / index.size)) for k in shown]
    shares.sort(key=lambda pair: -pair[1])
    entries = [(classes[k], share, tuple(colors[k].tolist())) for k, share in shares]
    return _add_legend(picture, entries)


def _strips(shape: tuple[int, ...]) -> list[slice]:
    """Rows of a picture, about `STRIP` pixels at a time."""
    height = max(1, STRIP // shape[1])
    return [slice(top, top + height) for top in range(0, shape[0], height)]


def _mixed(
    pixels: npt.NDArray[np.uint8],
    index: npt.NDArray[np.int64],
    edge: npt.NDArray[np.bool_],
    plain: list[int],
    colors: npt.NDArray[np.int64],
    alpha: float,
) -> npt.NDArray[np.uint8]:
    """Some rows of an overlay; labels in `plain` stay uncolored."""
    uncolored = np.isin(index, plain)
    tint = colors[np.where(uncolored, 0, index)]
    mixed = np.where(uncolored[..., None], pixels, (1 - alpha) * pixels + alpha * tint)
    mixed = np.where(edge[..., None], 0.25 * mixed + 0.75 * 255, mixed)
    rounded: npt.NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return rounded


def heat_overlay(
    image: Image.Image, scores: Tensor, low: float, high: float, alpha: float = 0.6
) -> Image.Image:
    """Lay one map over a picture in grays: dark blue at `low` over red to yellow at `high`.

    Lightness rises along the scale, so that the map reads without its colors, too.

    Args:
        image: the picture, any mode.
        scores: `[H, W]`; beyond the limits they count as the limit.
        low: score of the dark end.
        high: score of the bright end; equal limits make one color.
        alpha: opacity of the map, 0..1.

    Raises:
        DataError: sizes differ.
    """
    values = scores.float().cpu().numpy()
    if values.shape != (image.height, image.width):
        raise DataError(
            f"scores {values.shape} do not fit the image of {image.height}x{image.width} pixels"
        )
    gray = np.asarray(image.convert("L"))[..., None]
    mixed = np.empty((*values.shape, 3), np.uint8)
    stops = np.linspace(0, 1, len(HEAT))
    for rows in _strips(values.shape):
        place = np.clip((values[rows] - low) / max(high - low, 1e-12), 0, 1)
        colors = [np.interp(place, stops, channel) for channel in zip(*HEAT, strict=True)]
        mixed[rows] = ((1 - alpha) * gray[rows] + alpha * np.stack(colors, 2)).round()
    return Image.fromarray(mixed)


def legend_colors(classes: Sequence[str], palette: Sequence[Color] | None = None) -> list[Color]:
    """The color of every class in an overlay's legend; without a palette, background is gray."""
    colors = list(_colors(palette, len(classes)))[: len(classes)]
    if palette is None and BACKGROUND in classes:
        colors[list(classes).index(BACKGROUND)] = SWATCH
    return colors


def _colors(palette: Sequence[Color] | None, count: int) -> Sequence[Color]:
    if palette is None:
        return default_palette(max(count, 1))
    if len(palette) < count:
        raise DataError(f"a palette of {len(palette)} colors for {count} classes: give one each")
    return palette


def _outline(index: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.bool_]:
    """Pixels within `width` above or left of another label."""
    edge = np.zeros(index.shape, dtype=bool)
    for step in range(1, width + 1):
        edge[:-step] |= index[:-step] != index[step:]
        edge[:, :-step] |= index[:, :-step] != index[:, step:]
    return edge


def _add_legend(
    picture: Image.Image, entries: Sequence[tuple[str, float, tuple[int, ...]]]
) -> Image.Image:
    """Entries in as many equal columns as fit; a small picture gets a wider sheet."""
    size = min(max(13, min(picture.size) // 26), 40)
    font = ImageFont.load_default(size)
    gap, line = size // 2, round(size * 1.65)
    texts = [(name, _percent(share), color) for name, share, color in entries]
    name_width = max(round(font.getlength(name)) for name, _, _ in texts)
    share_width = max(round(font.getlength(share)) for _, share, _ in texts)
    column = size + gap + name_width + gap + share_width + 2 * size
    width = max(picture.width, column)
    columns = min(len(texts), max(1, width // column))
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (width, picture.height + rows * line + 2 * gap), PAPER)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (name, share, color) in enumerate(texts):
        x = size + (i // rows) * column  # down first: largest on the left
        y = picture.height + gap + (i % rows) * line + line // 2
        box = (x, y - size // 2, x + size, y - size // 2 + size)
        draw.rounded_rectangle(box, radius=size // 5, fill=color)
        draw.text((x + size + gap, y), name, INK, font, anchor="lm")
        end = x + size + gap + name_width + gap + share_width
        draw.text((end, y), share, FAINT, font, anchor="rm")
    return sheet


def _percent(share: float) -> str:
    return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, complete or not at all; its folder is made. It says that it is ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    note.add_text("Software", MARK)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=note)


def is_our_picture(path: Path) -> bool:
    """Whether `save_picture` wrote a file; label maps of version 0.1 are known by their palette."""
    try:
        with Image.open(path) as picture:
            if picture.info.get("Software") == MARK:
                return True
            palette = picture.getpalette() if picture.mode == "P" else None
            return (palette or [])[:765] == [part for one in default_palette(255) for part in one]
    except Exception:  # somebody's, of whatever kind
        return False


def save_label_map(
    labels: Tensor, path: str | Path, palette: Sequence[Color] | None = None, classes: int = 0
) -> None:
    """Write labels as a PNG whose pixel values are the classes, see `label_picture`.

    The file appears under its name when it is complete.

    Raises:
        DataError: a label does not fit 16 bits, or the labels are not `[H, W]`.
    """
    try:
        picture = label_picture(labels, palette, classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    save_picture(picture, Path(path))


def label_picture(
    labels: Tensor, palette: Sequence[Color] | None = None, classes: int = 0
) -> Image.Image:
    """Labels as a picture whose pixel values are the classes.

    Up to 255 classes make an indexed picture, which the palette colors; more make one of 16 bits,
    which has no colors.

    Args:
        labels: `[H, W]` integers 0..255, or 0..65535.
        palette: RGB triples, the rest black; `default_palette` for 0..254 if not given.
        classes: how many there are, so that all files of one list have one form; 0 goes by the
            labels.

    Raises:
        DataError: a label does not fit 16 bits, or the labels are not `[H, W]`.
    """
    index = labels.cpu().numpy()
    if index.ndim != 2 or index.size == 0 or index.min() < 0 or index.max() > 65535:
        raise DataError(f"labels {index.shape}: give [H, W] values 0..65535")
    if classes > 255 or index.max() > 255:
        return Image.fromarray(index.astype(np.uint16))
    picture = Image.fromarray(index.astype(np.uint8))
    colors = list(default_palette(255) if palette is None else palette)[:256]
    colors += [(0, 0, 0)] * (256 - len(colors))  # a short palette would make Pillow clip labels
    picture.putpalette([channel for color in colors for channel in color])
    return picture
