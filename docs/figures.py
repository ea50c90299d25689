"""Draw the figures of docs/concepts.md, which notebook 2 shows in their order, and of other pages.

`python docs/figures.py` after `make quickstart`; `… app openapi` draws these two alone.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import rasterio
import skimage.data
import torch
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright
from pycocotools.coco import COCO
from rasterio.transform import from_origin

from talk2dino import Exemplar, Talk2DINO
from talk2dino.alignment import ProjectionLayer
from talk2dino.datasets.mosaic import CONCEPTS, Mosaic, MosaicScenes
from talk2dino.encoders import TimmVisionEncoder
from talk2dino.finding.found_files import write_found
from talk2dino.maps.blocks import segment_map
from talk2dino.maps.geotiff import MapImage
from talk2dino.segmentation.overlay import ignored_label, legend_colors, overlay
from talk2dino.videos.frames import Smoother
from talk2dino.web.page import Page, show_page

REPOSITORY = Path(__file__).parents[1]
NAMES = ("components", "heads", "picked-heads", "cosines", "pamr")


def main() -> None:
    """Draw the figures that are named, or all."""
    quickstart, images = REPOSITORY / "outputs" / "quickstart", REPOSITORY / "docs" / "images"
    drawn: dict[str, Callable[[], None]] = {
        "concepts": partial(concepts, images),
        "annotations": partial(annotations, quickstart, images),
        "search": partial(search, quickstart, images),
        "exemplars": partial(exemplars, images),
        "map": partial(land, quickstart, images),
        "app": partial(page, quickstart, images),
        "openapi": partial(openapi, quickstart, images),
        "video": partial(video, images),
        "shares": partial(shares, images),
    }
    for name in sys.argv[1:] or drawn:
        drawn[name]()


def concepts(images: Path) -> None:
    """Execute notebook 2; its pictures are those of docs/concepts.md."""
    file = REPOSITORY / "notebooks" / "2_features_and_heads.ipynb"
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    pictures = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    for name, picture in zip(NAMES, pictures, strict=True):
        (images / f"{name}.png").write_bytes(base64.b64decode(picture))
        print(f"docs/images/{name}.png")


def annotations(quickstart: Path, images: Path) -> None:
    """What pycocotools reads from the file that docs/annotations.md writes, with polygons."""
    model = Talk2DINO.from_pretrained(quickstart / "dense")
    photograph = quickstart / "photograph.jpg"
    seg = model.segment(photograph, ["dahlia", "dark leaves"], pamr=True)
    with tempfile.TemporaryDirectory() as folder:
        how = {"instances": True, "minimum_area": 500, "polygons": True}
        (made,) = seg.save_annotations(folder, ["coco"], photograph.name, **how)
        coco = COCO(str(made / "instances.json"))
    picture = Image.open(photograph).convert("RGB")
    draw, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(15)
    colors = legend_colors(seg.classes)
    for one in coco.anns.values():
        color = colors[one["category_id"] - 1]
        for ring in one["segmentation"]:
            draw.polygon(ring, (*color, 90))
            draw.line(ring + ring[:2], color, 2)
            for x, y in zip(ring[::2], ring[1::2], strict=True):
                draw.rectangle((x - 2, y - 2, x + 2, y + 2), (255, 255, 255))
    for one in coco.anns.values():
        left, top, width, height = one["bbox"]
        color = colors[one["category_id"] - 1]
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=color, width=2)
        text = f"{coco.cats[one['category_id']]['name']} {one['score']:.2f}"
        place = draw.textbbox((left + 6, top + 4), text, font)
        draw.rectangle((place[0] - 4, place[1] - 3, place[2] + 4, place[3] + 3), color)
        draw.text((left + 6, top + 4), text, (0, 0, 0), font)
    picture.save(images / "annotations.png")
    print("docs/images/annotations.png")


def search(quickstart: Path, images: Path) -> None:
    """Thumbnails of the page that docs/search.md writes, of scenes that were not trained on."""
    queries, top = ["cat", "red brick wall", "rocket"], 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = ("source.split=heldout", "source.count=40", "source=mosaic")
        encoders = ("vision=dinov2_vits14", "text=minilm")
        command = [sys.executable, "-m", "talk2dino.extract", *scenes, *encoders]
        store = folder / "store"
        subprocess.run([*command, f"store={store}", f"hydra.run.dir={folder}"], check=True)
        source = Mosaic(split="heldout", count=40)
        for number in range(len(source)):
            file = folder / source.entry(number).file_name
            file.parent.mkdir(parents=True, exist_ok=True)
            source.image(number).save(file)
        model = Talk2DINO.from_pretrained(quickstart / "dense")
        facts = {"checkpoint": "", "store": "", "images": 40, "note": "", "recall": {}}
        write_found(model.search(store, queries, top), folder / "found", facts, folder)
        page = (folder / "found" / "found.html").read_text()
    found = re.findall(r'base64,([^"]+)"', page)
    thumbnails = [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]
    width, height = thumbnails[0].size
    line = height // 2 + 30
    sheet = Image.new("RGB", (top * (width // 2 + 8) - 8, len(queries) * line), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, picture in enumerate(thumbnails):
        row, column = divmod(number, top)
        small = picture.resize((width // 2, height // 2))
        sheet.paste(small, (column * (width // 2 + 8), row * line + 24))
    for row, query in enumerate(queries):
        draw.text((0, row * line + 2), query, (0, 0, 0), font)
    sheet.quantize(128).save(images / "search.png", optimize=True)
    print("docs/images/search.png")


def exemplars(images: Path) -> None:
    """Two scenes with masks, and a third one segmented by them; ψ is random, for it has no part."""
    vision = TimmVisionEncoder("vit_small_patch14_dinov2.lvd142m", weights="bundled")
    model = Talk2DINO(vision, None, ProjectionLayer(384, vision.embed_dim))
    train, heldout = (MosaicScenes(split, 40, 336, 336) for split in ("train", "heldout"))
    kinds = [set(np.unique(scene.labels)) for scene in train]
    wanted, scene = next(
        (found, scene)
        for scene in heldout
        if len(found := set(np.unique(scene.labels))) == 3
        and any(found <= one | other for one in kinds for other in kinds)
    )
    pairs = ((one, other) for one in range(40) for other in range(one + 1, 40))
    chosen = next(pair for pair in pairs if wanted <= kinds[pair[0]] | kinds[pair[1]])
    shown = [train[number] for number in chosen]
    names = [CONCEPTS[number].name for number in sorted(wanted)]
    classes = {
        CONCEPTS[number].name: [
            Exemplar(one.image, one.labels == number) for one in shown if number in one.labels
        ]
        for number in sorted(wanted)
    }
    parts = []
    for one in shown:
        labels = np.full(one.labels.shape, ignored_label(len(names)), np.int64)
        for index, number in enumerate(sorted(wanted)):
            labels[one.labels == number] = index
        labels = torch.from_numpy(labels)
        parts.append(overlay(Image.fromarray(one.image), labels, names, legend=False))
    seg = model.segment(scene.image, classes, pamr=True)
    parts += [Image.fromarray(scene.image), seg.overlay()]
    joined = Image.new("RGB", (4 * 336 + 3 * 12, parts[-1].height), "white")
    for place, part in enumerate(parts):
        joined.paste(part, (place * (336 + 12), 0))
    joined.quantize(128).save(images / "exemplars.png", optimize=True)
    print("docs/images/exemplars.png")


def land(quickstart: Path, images: Path) -> None:
    """Fields of three textures as a map, and the labels of two files that overlap."""
    fields = [getattr(skimage.data, name)() for name in ("grass", "gravel", "brick")]
    down, right = np.mgrid[:800, :1600]
    kind = (np.sin(right / 210 + down / 400) + np.sin(down / 170 - right / 500)).round() % 3
    tiled = [np.tile(field[::2, ::2], (4, 7))[:800, :1600] for field in fields]
    pixels = np.choose(kind.astype(int), tiled).astype(np.uint8)
    model = Talk2DINO.from_pretrained(quickstart / "dense")
    vocabulary = model.open_vocabulary(["grass", "gravel", "brick wall"], short_side=224)
    sheet = Image.new("RGB", (1620, 400), (255, 255, 255))
    sheet.paste(Image.fromarray(pixels).resize((800, 400)))
    with tempfile.TemporaryDirectory() as name:
        for number, (start, stop, top) in enumerate(((0, 900, 0), (700, 1600, 400))):
            file = Path(name, f"{number}.tif")
            corner = from_origin(500_000 + start / 2, 5_400_000, 0.5, 0.5)
            profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "crs": "EPSG:32632"}
            part = pixels[:, start:stop]
            size = {"height": 800, "width": stop - start}
            with rasterio.open(file, "w", transform=corner, **profile, **size) as out:
                out.write(part, 1)
            with MapImage(file, meters_per_pixel=0.5) as image:
                segment_map(vocabulary, image, Path(name, "labels.tif"))
            with rasterio.open(Path(name, "labels.tif")) as found:
                colors = np.array([found.colormap(1)[n][:3] for n in range(3)], np.uint8)
                shown = Image.fromarray(colors[found.read(1)])
            half = shown.resize(((stop - start) // 2, 400), Image.Resampling.NEAREST)
            half = half.crop((0, top // 2, half.width, top // 2 + 200))
            sheet.paste(half, (820 + start // 2, top // 2))
    sheet.save(images / "map.png")
    print("docs/images/map.png")


@contextmanager
def browser(address: str, height: int) -> Iterator[Tab]:
    """A page in Chromium; when it is closed, nothing came from elsewhere than this machine."""
    asked: list[str] = []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        tab = chromium.new_page(viewport={"width": 1200, "height": height})
        tab.set_default_timeout(60_000)
        tab.on("request", lambda one: asked.append(one.url))
        tab.goto(address)
        yield tab
        chromium.close()
    own = "/".join(address.split("/")[:3])
    elsewhere = [one for one in asked if not one.startswith((own, "data:", "blob:"))]
    assert asked and not elsewhere, elsewhere


def save(tab: Tab, path: Path) -> None:
    """What the page shows."""
    shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    shot.quantize(128).save(path, optimize=True)
    print(f"docs/images/{path.name}")


def page(quickstart: Path, images: Path) -> None:
    """The web page in a browser (Chromium), with two classes that are painted."""
    model = Talk2DINO.from_pretrained(quickstart / "dense")
    blocks = Page(model, "outputs/quickstart/dense").build()
    address = show_page(blocks, "127.0.0.1", None, max_upload_mb=20)
    with browser(address, 1420) as tab:
        tab.wait_for_selector("#picture input[type=file]", state="attached")
        tab.set_input_files("#picture input[type=file]", quickstart / "photograph.jpg")
        tab.click("#by-example button")
        tab.wait_for_selector("#editor canvas")
        tab.wait_for_timeout(15_000)  # until the picture is on the canvas

        def paint(right: float, down: float) -> None:
            """A block of strokes that begins at a part of the canvas, wherever that is by now."""
            tab.locator("#editor canvas").first.scroll_into_view_if_needed()
            place = tab.locator("#editor canvas").first.bounding_box()
            assert place is not None
            x, y = place["x"] + right * place["width"], place["y"] + down * place["height"]
            tab.mouse.move(x, y)
            tab.mouse.down()
            for row in range(6):
                tab.mouse.move(x + (row % 2) * 110, y + 20 * row, steps=4)
            tab.mouse.up()
            tab.wait_for_timeout(2000)

        for name, *where in (("this flower", 0.42, 0.35), ("leaves", 0.12, 0.3)):
            paint(*where)
            tab.fill("#name textarea, #name input", name)
            tab.click("#add")
            tab.wait_for_selector(f"#examples label:has-text('{name} 1')")
            tab.wait_for_selector(f"#shown label:has-text('{name}')")
            tab.wait_for_timeout(4000)
        paint(0.42, 0.35)  # the editor is empty again
        tab.locator("#overlay img").click(position={"x": 240, "y": 150})
        tab.wait_for_selector("#scores td")
        save(tab, images / "app.png")
    blocks.close()


def openapi(quickstart: Path, images: Path) -> None:
    """The description of the service, with the fields of POST /segment."""
    command = [
        sys.executable,
        "-m",
        "talk2dino.serve",
        f"checkpoint={quickstart / 'dense'}",
        "port=0",
    ]
    service = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        address = next(line for line in service.stdout if line.startswith("http")).split()[0]
        with browser(f"{address}/docs", 2020) as tab:
            tab.click("#operations-default-segment_segment_post .opblock-summary")
            tab.click(".try-out__btn")
            tab.wait_for_selector(".execute")
            save(tab, images / "openapi.png")
    finally:
        service.terminate()
        service.wait()


def video(images: Path) -> None:
    """Frames of a still camera with noise, and what changed since the frame before, both ways."""
    vision = TimmVisionEncoder("vit_small_patch14_dinov2.lvd142m", weights="bundled")
    model = Talk2DINO(vision, None, ProjectionLayer(384, vision.embed_dim))  # nothing is said
    train = list(MosaicScenes("train", 40, 224, 224))
    scenes = MosaicScenes("heldout", 40, 224, 336)
    scene = next(one for one in scenes if len(np.unique(one.labels)) > 2)
    classes = {
        CONCEPTS[number].name: [
            Exemplar(one.image, one.labels == number) for one in train if number in one.labels
        ][:2]
        for number in np.unique(scene.labels)
    }
    vocabulary = model.open_vocabulary(classes, short_side=224)
    random, frames = np.random.default_rng(0), []
    for _ in range(6):
        noisy = scene.image + random.normal(0, 12, scene.image.shape)
        frames.append(vocabulary.encode([noisy.clip(0, 255).astype(np.uint8)])[0])
    rows = []
    for strength in (0.0, Smoother().strength):
        smoother = Smoother(strength)
        found = [vocabulary(smoother(frame)) for frame in frames]
        row = [found[-2].overlay(legend=False), found[-1].overlay(legend=False)]
        changed = (found[-2].labels != found[-1].labels).numpy()
        rows.append([Image.fromarray(scene.image), *row, Image.fromarray(changed).convert("RGB")])
    said = ["the scene", "frame 5", "frame 6", "changed"]
    font = ImageFont.load_default(16)
    sheet = Image.new("RGB", (4 * 336 + 3 * 8, 24 + 2 * (224 + 24)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * 248
        how = f"smoothing={Smoother().strength:g}" if number else "each frame by itself"
        for place, (picture, name) in enumerate(zip(row, said, strict=True)):
            title = name if place else how
            draw.text((place * 344, top + 2), title, (0, 0, 0), font)
            sheet.paste(picture, (place * 344, top + 24))
    sheet.quantize(128).save(images / "video.png", optimize=True)
    print("docs/images/video.png")


def shares(images: Path) -> None:
    """Which process takes which picture of a folder, and who gathers."""
    colors = [(196, 218, 245), (250, 220, 180), (200, 235, 200)]
    sheet = Image.new("RGB", (1000, 330), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)

    def box(x: int, y: int, width: int, text: str, fill: tuple[int, int, int]) -> None:
        draw.rectangle((x, y, x + width, y + 34), fill, (90, 90, 90))
        draw.text((x + width / 2, y + 17), text, (0, 0, 0), font, "mm")

    for picture in range(9):
        x, rank = 14 + picture * 109, picture % 3
        box(x, 14, 98, f"{picture + 1}.jpg", colors[rank])
        draw.line((x + 49, 48, 170 + rank * 330, 110), (130, 130, 130), 2)
    for rank in range(3):
        x = 40 + rank * 330
        box(x, 110, 260, f"rank {rank}: encode, decide, write", colors[rank])
        box(x, 180, 260, f"segmented/.parts: record {rank}", (240, 240, 240))
        draw.line((x + 130, 144, x + 130, 180), (130, 130, 130), 2)
        draw.line((x + 130, 214, 500, 270), (130, 130, 130), 2)
    box(
        190,
        270,
        620,
        "the last to finish: one data set per format, one list of what failed",
        (240, 240, 240),
    )
    sheet.quantize(32).save(images / "shares.png", optimize=True)
    print("docs/images/shares.png")


if __name__ == "__main__":
    main()
