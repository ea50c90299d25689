"""Flicker of a video's labels, with smoothing and without.

    python benchmarks/video.py
    python benchmarks/video.py --images DIR --checkpoint RUN --frames 12

Videos are views of generated scenes, whose classes other scenes show (exemplars, so no text encoder
and no projection count), or of photographs and words: a still camera, and one that pans by two
pixels a frame; every frame has noise of its own. Flicker is the share of pixels whose label is
another one than in the frame before (of the pan, than at the place where that pixel was).
Agreement is the share of pixels with the label that the frame has without noise and without
smoothing: what smoothing blurs or delays lowers it. Right is the share of pixels with the label of
the scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.alignment import ProjectionLayer
from talk2dino.datasets.mosaic import CONCEPTS, MosaicScenes
from talk2dino.encoders import TimmVisionEncoder
from talk2dino.inference.exemplars import Exemplar
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.videos.frames import Smoother

WORDS = ["person", "car", "dog", "cat", "grass", "sky", "building", "tree", "water", "road"]
WORDS += ["table", "wall", "floor", "food", "bed", "train"]
PAN = 2  # pixels a frame
Clip = tuple[np.ndarray, np.ndarray | None]  # a wide picture, and the class of each of its pixels


def generated(count: int, side: int, frames: int) -> tuple[OpenVocabulary, list[Clip]]:
    """Scenes of three things or more, and all things as classes, by two exemplars each."""
    vision = TimmVisionEncoder("vit_small_patch14_dinov2.lvd142m", weights="bundled")
    model = Talk2DINO(vision, None, ProjectionLayer(384, vision.embed_dim))
    train = list(MosaicScenes("train", 60, side, side))
    classes, known = {}, []
    for number, concept in enumerate(CONCEPTS):
        masks = [(one.image, one.labels == number) for one in train]
        shown = [Exemplar(*pair) for pair in masks if pair[1].mean() > 0.05][:2]
        if shown:
            classes[concept.name] = shown
            known.append(number)
    index = np.full(256, 255)
    index[known] = range(len(known))
    scenes = MosaicScenes("heldout", 60, side, side + PAN * frames)
    rich = [one for one in scenes if len(np.unique(one.labels)) >= 3][:count]
    clips: list[Clip] = [(one.image, index[one.labels.astype(np.uint8)]) for one in rich]
    return model.open_vocabulary(classes, short_side=side), clips


def measure(
    vocabulary: OpenVocabulary,
    clip: Clip,
    frames: int,
    noise: float,
    pan: int,
    strengths: list[float],
) -> np.ndarray:
    """Flicker, agreement and right labels, a row for each strength."""
    random, smoothers = np.random.default_rng(0), [Smoother(one) for one in strengths]
    wide, truth = clip
    width = wide.shape[1] - PAN * frames
    figures, last = np.zeros((len(strengths), 3)), [torch.empty(0)] * len(strengths)
    want: Tensor | None = None
    for number in range(frames):
        view = np.s_[:, pan * number : pan * number + width]
        frame = np.ascontiguousarray(wide[view])
        if pan or want is None:
            want = vocabulary(frame).labels
        noisy = (frame + random.normal(0, noise, frame.shape)).clip(0, 255).astype(np.uint8)
        picture = vocabulary.encode([noisy])[0]
        for row, smoother in enumerate(smoothers):
            labels = vocabulary(smoother(picture)).labels
            figures[row, 1] += float((labels == want).double().mean()) / frames
            if truth is not None:
                seen = truth[view] < 255
                right = labels.numpy()[seen] == truth[view][seen]
                figures[row, 2] += right.mean() / frames
            if number:
                changed = labels[:, : width - pan] != last[row][:, pan:]
                figures[row, 0] += float(changed.double().mean()) / (frames - 1)
            last[row] = labels
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of photographs, in place of scenes")
    parser.add_argument("--checkpoint", help="for the words of photographs")
    parser.add_argument("--count", type=int, default=3, help="clips")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--noise", type=float, default=12, help="standard deviation of 0..255")
    parser.add_argument("--short-side", type=int, default=224)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 0.75, 0.9])
    given = parser.parse_args()
    if given.images is None:
        vocabulary, clips = generated(given.count, given.short_side, given.frames)
    elif given.checkpoint is None:
        parser.error("--images needs --checkpoint")
    else:
        model = Talk2DINO.from_pretrained(given.checkpoint)
        vocabulary = model.open_vocabulary(WORDS, short_side=given.short_side)
        files = sorted(path for path in given.images.iterdir() if path.suffix == ".jpg")
        clips = [(np.asarray(Image.open(one).convert("RGB")), None) for one in files[: given.count]]
    print(
        f"{len(clips)} clips, {given.frames} frames each, noise {given.noise:g}, short_side "
        f"{given.short_side}, {len(vocabulary.words.names)} classes"
    )
    print(f"{'camera':<8}{'smoothing':>10}{'flicker':>9}{'agreement':>11}{'right':>8}")
    for camera, pan in (("still", 0), ("pans", PAN)):
        found = np.mean(
            [
                measure(vocabulary, clip, given.frames, given.noise, pan, given.strengths)
                for clip in clips
            ],
            axis=0,
        )
        for strength, (flicker, agreement, right) in zip(given.strengths, 100 * found, strict=True):
            print(
                f"{camera:<8}{strength:10g}{flicker:8.2f} {agreement:10.2f} {right:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
