"""ψ and the dense path as ONNX graphs, for machines without PyTorch.

The dense graph holds vision backbone and cosine, at one window size: image → class scores. Its
class embeddings are in it, or an input. Background cleaning needs the attention maps and stays out;
so do sliding windows and PAMR.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.calibration.calibration import Calibration
from talk2dino.calibration.rules import Reference
from talk2dino.encoders.layers import join_layers, watched
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import quiet
from talk2dino.errors import ConfigError
from talk2dino.inference.onnx_files import (
    ExportedFile,
    Graph,
    check_weights,
    write_graph,
    write_int8,
)
from talk2dino.segmentation.scores import class_scores, upsample, with_offsets
from talk2dino.segmentation.segmenter import Segmenter


class DensePath(nn.Module):
    """One window to class scores, without hooks or modes: what the dense graph computes.

    Args:
        vision: encoder; its network is copied and fixed to the window size.
        rows: `[N, D]` unit text rows.
        row_classes: `[N]` int64, the class of every row.
        size: side of the window in pixels.
        project_patches: image side of the projection, or None.
        full_size: scores at window size instead of one per patch.
        open_vocabulary: the rows come with every image instead; one row is one class.
    """

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor  # [1, 3, 1, 1]
    class_embeddings: Tensor  # [N, D]

    def __init__(
        self,
        vision: TimmVisionEncoder,
        rows: Tensor,
        row_classes: Tensor,
        size: int,
        project_patches: nn.Module | None,
        full_size: bool,
        open_vocabulary: bool = False,
    ) -> None:
        super().__init__()
        self.backbone: Any = copy.deepcopy(vision.model).cpu()
        if not vision.fixed_size:
            with quiet():  # timm reports it
                self.backbone.set_input_size(img_size=(size, size))  # resamples positions now
        self.prefix, self.layers = vision.num_prefix_tokens, vision.layers
        self.grid = (size // vision.patch_size, size // vision.patch_size)
        self.size = size if full_size else None
        self.project_patches = copy.deepcopy(project_patches)
        self.merges = not open_vocabulary and int(row_classes.max()) + 1 < len(row_classes)
        self.register_buffer("mean", vision.mean.cpu().clone())
        self.register_buffer("std", vision.std.cpu().clone())
        if not open_vocabulary:
            self.register_buffer("class_embeddings", rows.cpu().clone())
        self.counts = row_classes.bincount().tolist()

    def _patch_tokens(self, pixels: Tensor) -> Tensor:
        """`[1, P, D]` as the encoder gives them; what `layers` do not need is left out."""
        if self.layers is None:
            return self.backbone.forward_features(pixels)[:, self.prefix :]  # type: ignore[no-any-return]
        with watched(self.backbone, self.layers) as taps:
            self.backbone.forward_features(pixels)
        return join_layers(self.backbone, taps, self.layers)[:, self.prefix :]

    def forward(self, image: Tensor, class_embeddings: Tensor | None = None) -> Tensor:
        """`[1, 3, S, S]` float RGB 0..1 to `[1, K, S, S]`, or `[1, K, S/p, S/p]`."""
        tokens = self._patch_tokens((image - self.mean) / self.std)
        if self.project_patches is not None:
            tokens = self.project_patches(tokens)
        rows = self.class_embeddings if class_embeddings is None else class_embeddings
        scores = class_scores(tokens, rows, self.grid)
        if self.merges:  # a class scores as its best row; rows of a class lie side by side
            parts = torch.split(scores, self.counts, dim=1)
            scores = torch.cat([part.amax(dim=1, keepdim=True) for part in parts], dim=1)
        return scores if self.size is None else upsample(scores, self.size, self.size)


class UnitProjection(nn.Module):
    """ψ and unit length: the mean of a class's text embeddings to its row.

    With a calibration, whose reference goes into the graph, rows come with their offsets.
    """

    tokens: Tensor  # [R, D] of a calibration
    vocabulary: Tensor  # [V, D] of a calibration
    means: Tensor | None  # [V, D] of one that knows captions

    def __init__(self, projection: Projection, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.projection = copy.deepcopy(projection).cpu()
        self.rule = calibration.rule if calibration else None
        if calibration is not None:
            reference = calibration.reference(self.projection)
            self.register_buffer("tokens", reference.tokens.detach())
            self.register_buffer("vocabulary", reference.vocabulary.detach())
            self.register_buffer("means", reference.means)

    def forward(self, embedding: Tensor) -> Tensor:
        """`[N, C]` to `[N, D]` of unit length, or calibrated `[N, D + 1]`."""
        rows = F.normalize(self.projection.project_embedding(embedding), dim=-1, eps=1e-6)
        if self.rule is None:
            return rows
        return with_offsets(*self.rule(rows, Reference(self.tokens, self.vocabulary, self.means)))


def export_dense(
    path: Path,
    vision: TimmVisionEncoder,
    projection: Projection,
    rows: Tensor,
    row_classes: Tensor,
    metadata: Mapping[str, Any],
    size: int = 448,
    full_size: bool = True,
    tolerance: float = 1e-4,
    int8_tolerance: float | None = None,
    open_vocabulary: bool = False,
) -> list[ExportedFile]:
    """Write the dense path: input `image`, output `scores`.

    Args:
        path: `.onnx` file.
        vision: encoder.
        projection: whose image side, if it has one, goes into the graph.
        rows: `[N, D]` unit text rows or `[N, D + 1]` with offsets, those of a class side by side.
        row_classes: `[N]` int64.
        metadata: JSON values for the file's `metadata_props`, besides those of the encoder.
        size: side of the window in pixels, a multiple of the patch size.
        full_size: scores at window size, `[1, K, S, S]`; else one per patch.
        tolerance: largest difference from PyTorch that is accepted.
        int8_tolerance: that of a second file, `X-int8.onnx`, with weights of 8 bits; None: no such.
        open_vocabulary: `class_embeddings` `[K, D]` is a second input, and `rows`, one per class,
            are an example.

    Returns:
        What was written: one file, or two.

    Raises:
        EncoderError: the network cannot be exported.
        ConfigError: an absent package, a size the encoder cannot take, or too large a deviation.
    """
    check_export_size(vision, size)
    side = visual_side(projection)
    module = DensePath(vision, rows, row_classes, size, side, full_size, open_vocabulary).eval()
    # the reference is the segmenter itself, with its hooks: not the module that is exported
    segmenter = Segmenter(vision.cpu(), input_size=size, project_patches=side)
    image = _picture(size)
    want = segmenter.token_scores(
        segmenter.encode_windows(image * 255), rows.cpu(), row_classes.cpu()
    )
    want = upsample(want, size, size) if full_size else want
    facts = {
        "window": size,
        "patch_size": vision.patch_size,
        "mean": vision.mean.flatten().tolist(),
        "std": vision.std.flatten().tolist(),
        "input": "image: float32 [1, 3, window, window], RGB, 0..1; mean and std are in the graph",
        "output": "scores: float32 [1, classes, h, w], sigmoid of the cosine minus the offset",
    }
    given, free = {"image": image}, None
    if open_vocabulary:
        given["class_embeddings"] = rows.cpu()
        free = {"class_embeddings": {0: "classes"}}
        facts["class_embeddings"] = f"float32 [classes, {rows.shape[1]}], of projection.onnx"
    graph = Graph(module, given, "scores", want, facts | dict(metadata), free)
    done = [write_graph(path, graph, tolerance)]
    if int8_tolerance is not None:
        smaller = path.with_name(f"{path.stem}-int8.onnx")
        done.append(write_int8(smaller, path, graph, int8_tolerance))
    return done


def export_projection(
    path: Path,
    projection: Projection,
    metadata: Mapping[str, Any],
    tolerance: float = 1e-4,
    calibration: Calibration | None = None,
) -> ExportedFile:
    """Write ψ with unit length: input `embedding` [N, C], output `class_embedding` [N, D].

    With a calibration the output is [N, D + 1], the offset in the last column. Other arguments and
    errors as `export_dense`.
    """
    module = UnitProjection(projection, calibration).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = torch.randn(3, projection.text_dim)
    with torch.no_grad():
        want = F.normalize(module.projection.project_embedding(embedding), dim=-1, eps=1e-6)
        if calibration is not None:
            want = calibration.score_rows(want, [None] * len(want), module.projection)
    kind = "unit length and, in the last column, the offset" if calibration else "unit length"
    facts = {
        "input": f"embedding: float32 [N, {projection.text_dim}], mean over a class's sentences",
        "output": f"class_embedding: float32 [N, {want.shape[1]}], {kind}",
    }
    free = {"embedding": {0: "rows"}}
    graph = Graph(
        module, {"embedding": embedding}, "class_embedding", want, facts | dict(metadata), free
    )
    return write_graph(path, graph, tolerance)


def check_export_size(vision: TimmVisionEncoder, size: int) -> None:
    """Refuse what `export_dense` cannot write, before other files are.

    Raises:
        ConfigError: pictures of `size` pixels a side do not fit the encoder.
        EncoderError: its weights are not there.
    """
    patch = vision.patch_size
    if size < patch or size % patch:
        nearest = max(1, round(size / patch)) * patch
        raise ConfigError(
            f"image_size={size}: no multiple of the patch size {patch}; use {nearest}"
        )
    if vision.fixed_size and size != vision.image_size:
        raise ConfigError(f"image_size={size}: {vision.name} takes {vision.image_size} pixels only")
    check_weights("vision", vision)


def _picture(size: int) -> Tensor:
    """`[1, 3, S, S]` in 0..1: blobs of color under a little noise, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blobs = upsample(torch.rand(1, 3, 5, 5), size, size)
        return (blobs + 0.1 * torch.rand(1, 3, size, size)).clamp(0, 1)


def sorted_rows(rows: Tensor, row_classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Text rows with those of a class side by side, as the graph wants them."""
    classes = torch.tensor(row_classes)
    order = classes.argsort(stable=True)
    return rows.cpu()[order], classes[order]
