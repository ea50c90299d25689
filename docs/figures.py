"""Draw the figures of docs/concepts.md, which notebook 2 shows in their order, and annotations.md.

`python docs/figures.py` after `make quickstart`.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO

from talk2dino import Talk2DINO
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


if __name__ == "__main__":
    main()
