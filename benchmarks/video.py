"""Flicker of a video's labels, with smoothing and without.

    python benchmarks/video.py --checkpoint RUN
    python benchmarks/video.py --checkpoint RUN --images DIR --count 6 --frames 12

Videos are made of photographs: a still camera, and one that pans by four pixels a frame; every
frame has noise of its own. Flicker is the share of pixels whose label is another one than in the
frame before (of the pan, than at the place where that pixel was). Agreement is the share of pixels
with the label that the frame has without noise and without smoothing: what smoothing blurs or
delays lowers it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.videos.frames import Smoother

WORDS = ["person", "car", "dog", "cat", "grass", "sky", "building", "tree", "water", "road"]
WORDS += ["table", "wall", "floor", "food", "bed", "train"]
PAN = 4  # pixels a frame


def clip(photo: np.ndarray, frames: int, pan: int) -> list[np.ndarray]:
    """Parts of a photograph, one per frame, of one size."""
    width = photo.shape[1] - pan * frames
    return [photo[:, pan * n : pan * n + width] for n in range(frames)]


def measure(
    vocabulary: OpenVocabulary, clean: list[np.ndarray], noise: float, strength: float, pan: int
) -> tuple[float, float, float]:
    """Flicker, agreement, and seconds a frame for smoothing."""
    random, smoother = np.random.default_rng(0), Smoother(strength)
    flicker, agreement, spent = [], [], 0.0
    last: Tensor | None = None
    for frame in clean:
        noisy = (frame + random.normal(0, noise, frame.shape)).clip(0, 255).astype(np.uint8)
        want, picture = vocabulary(frame).labels, vocabulary.encode([noisy])[0]
        begun = time.perf_counter()
        picture = smoother(picture)
        spent += time.perf_counter() - begun
        labels = vocabulary(picture).labels
        agreement.append(float((labels == want).double().mean()))
        if last is not None:
            same = labels[:, : labels.shape[1] - pan], last[:, pan:]
            flicker.append(float((same[0] != same[1]).double().mean()))
        last = labels
    return float(np.mean(flicker)), float(np.mean(agreement)), spent / len(clean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata" / "coco100" / "images"
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", type=Path, default=default, help="folder of photographs")
    parser.add_argument("--count", type=int, default=6, help="photographs")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--noise", type=float, default=10, help="standard deviation of 0..255")
    parser.add_argument("--short-side", type=int, default=224)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 0.75, 0.9])
    given = parser.parse_args()
    vocabulary = Talk2DINO.from_pretrained(given.checkpoint).open_vocabulary(
        WORDS, short_side=given.short_side
    )
    files = sorted(path for path in given.images.iterdir() if path.suffix == ".jpg")[: given.count]
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    print(
        f"{len(photos)} photographs, {given.frames} frames each, noise {given.noise:g}, short_side "
        f"{given.short_side}, {len(WORDS)} words, {torch.get_num_threads()} threads"
    )
    print(f"{'camera':<8}{'smoothing':>10}{'flicker':>9}{'agreement':>11}{'s a frame':>11}")
    for camera, pan in (("still", 0), ("pans", PAN)):
        for strength in given.strengths:
            found = [
                measure(vocabulary, clip(photo, given.frames, pan), given.noise, strength, pan)
                for photo in photos
            ]
            flicker, agreement, seconds = np.mean(found, axis=0)
            print(
                f"{camera:<8}{strength:10g}{100 * flicker:8.2f} {100 * agreement:10.2f} "
                f"{seconds:10.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
