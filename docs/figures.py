"""Draw the figures of docs/concepts.md, which notebook 2 shows in their order, and of two pages.

`python docs/figures.py` after `make quickstart`.
"""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO

from talk2dino import Talk2DINO
from talk2dino.datasets.mosaic import Mosaic
from talk2dino.finding.found_files import write_found
from talk2dino.segmentation.overlay import legend_colors

REPOSITORY = Path(__file__).parents[1]
NAMES = ("components", "heads", "picked-heads", "cosines", "pamr")


def main() -> None:
    """Execute the notebook and write its pictures into docs/images."""
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
        path = REPOSITORY / "docs" / "images" / f"{name}.png"
        path.write_bytes(base64.b64decode(picture))
        print(path.relative_to(REPOSITORY))
    annotations(REPOSITORY / "outputs" / "quickstart", REPOSITORY / "docs" / "images")
    search(REPOSITORY / "outputs" / "quickstart", REPOSITORY / "docs" / "images")


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
    sheet.save(images / "search.png")
    print("docs/images/search.png")


if __name__ == "__main__":
    main()
