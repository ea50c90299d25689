"""ψ and the dense path as ONNX graphs, for machines without PyTorch.

The dense graph holds vision backbone, class embeddings and the cosine, at one window size:
image → class scores. Background cleaning needs the attention maps and stays out; so do sliding
windows and PAMR. Every file is compared with PyTorch before it gets its name.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import quiet
from talk2dino.errors import ConfigError, EncoderError
from talk2dino.files import replacing
from talk2dino.segmentation.scores import class_scores, upsample
from talk2dino.segmentation.segmenter import Segmenter

OPSET = 18
LARGEST = 1_900_000_000  # bytes of weights in one file; protobuf ends at 2 GiB
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportedFile:
    """What was written and how far it is from PyTorch.

    Attributes:
        path: the `.onnx` file.
        deviation: largest absolute difference of an output.
    """

    path: Path
    deviation: float


class DensePath(nn.Module):
    """One window to class scores, without hooks or modes: what the dense graph computes.

    Args:
        vision: encoder; its network is copied and fixed to the window size.
        rows: `[N, D]` unit text rows.
        row_classes: `[N]` int64, the class of every row.
        size: side of the window in pixels.
        project_patches: image side of the projection, or None.
        full_size: scores at window size instead of one per patch.
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
    ) -> None:
        super().__init__()
        self.backbone: Any = copy.deepcopy(vision.model).cpu()
        if not vision.anatomy.fixed_size:
            with quiet():  # timm reports it
                self.backbone.set_input_size(img_size=(size, size))  # resamples positions now
        self.prefix = vision.num_prefix_tokens
        self.grid = (size // vision.patch_size, size // vision.patch_size)
        self.size = size if full_size else None
        self.project_patches = copy.deepcopy(project_patches)
        self.merges = int(row_classes.max()) + 1 < len(row_classes)
        self.register_buffer("mean", vision.mean.cpu().clone())
        self.register_buffer("std", vision.std.cpu().clone())
        self.register_buffer("class_embeddings", rows.cpu().clone())
        self.counts = row_classes.bincount().tolist()

    def forward(self, image: Tensor) -> Tensor:
        """`[1, 3, S, S]` float RGB 0..1 to `[1, K, S, S]`, or `[1, K, S/p, S/p]`."""
        tokens = self.backbone.forward_features((image - self.mean) / self.std)
        tokens = tokens[:, self.prefix :]  # [1, P, D]
        if self.project_patches is not None:
            tokens = self.project_patches(tokens)
        scores = class_scores(tokens, self.class_embeddings, self.grid)
        if self.merges:  # a class scores as its best row; rows of a class lie side by side
            parts = torch.split(scores, self.counts, dim=1)
            scores = torch.cat([part.amax(dim=1, keepdim=True) for part in parts], dim=1)
        return scores if self.size is None else upsample(scores, self.size, self.size)


class UnitProjection(nn.Module):
    """ψ and unit length: the mean of a class's text embeddings to its row."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = copy.deepcopy(projection).cpu()

    def forward(self, embedding: Tensor) -> Tensor:
        """`[N, C]` to `[N, D]` of unit length."""
        return F.normalize(self.projection.project_embedding(embedding), dim=-1, eps=1e-6)


def require_packages() -> None:
    """Refuse to begin without the packages of the extra `export`.

    Raises:
        EncoderError: one is absent.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise EncoderError(
            f"export needs {', '.join(absent)}; install with: pip install 'talk2dino[export]'"
        )


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
) -> ExportedFile:
    """Write the dense path: input `image`, output `scores`.

    Args:
        path: `.onnx` file.
        vision: encoder.
        projection: whose image side, if it has one, goes into the graph.
        rows: `[N, D]` unit text rows, those of a class side by side.
        row_classes: `[N]` int64.
        metadata: JSON values for the file's `metadata_props`, besides those of the encoder.
        size: side of the window in pixels, a multiple of the patch size.
        full_size: scores at window size, `[1, K, S, S]`; else one per patch.
        tolerance: largest difference from PyTorch that is accepted.

    Raises:
        EncoderError: packages are absent, or the network cannot be exported.
        ConfigError: a size the encoder cannot take, or a deviation beyond the tolerance.
    """
    require_packages()
    _check_size(vision, size)
    side = visual_side(projection)
    path_module = DensePath(vision, rows, row_classes, size, side, full_size).eval()
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
        "output": "scores: float32 [1, classes, h, w], sigmoid of the cosine",
    }
    return _write(
        path, path_module, image, "image", "scores", want, facts | dict(metadata), tolerance
    )


def export_projection(
    path: Path, projection: Projection, metadata: Mapping[str, Any], tolerance: float = 1e-4
) -> ExportedFile:
    """Write ψ with unit length: input `embedding` [N, C], output `class_embedding` [N, D].

    Arguments and errors as `export_dense`.
    """
    require_packages()
    module = UnitProjection(projection).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = torch.randn(3, projection.text_dim)
    with torch.no_grad():
        want = F.normalize(module.projection.project_embedding(embedding), dim=-1, eps=1e-6)
    facts = {
        "input": f"embedding: float32 [N, {projection.text_dim}], mean over a class's sentences",
        "output": f"class_embedding: float32 [N, {projection.vision_dim}], unit length",
    }
    names = ("embedding", "class_embedding")
    return _write(path, module, embedding, *names, want, facts | dict(metadata), tolerance, True)


def _check_size(vision: TimmVisionEncoder, size: int) -> None:
    patch = vision.patch_size
    if size < patch or size % patch:
        nearest = max(1, round(size / patch)) * patch
        raise ConfigError(
            f"image_size={size}: no multiple of the patch size {patch}; use {nearest}"
        )
    if vision.anatomy.fixed_size and size != vision.image_size:
        raise ConfigError(f"image_size={size}: {vision.name} takes {vision.image_size} pixels only")
    weights = sum(p.numel() * 4 for p in vision.parameters())
    if weights > LARGEST:
        raise ConfigError(
            f"vision.name={vision.name}: {weights / 1e9:.1f} GB of weights do not fit one ONNX "
            "file; choose a smaller encoder"
        )


def _picture(size: int) -> Tensor:
    """`[1, 3, S, S]` in 0..1: blobs of color under a little noise, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blobs = upsample(torch.rand(1, 3, 5, 5), size, size)
        return (blobs + 0.1 * torch.rand(1, 3, size, size)).clamp(0, 1)


def _write(
    path: Path,
    module: nn.Module,
    example: Tensor,
    given: str,
    result: str,
    want: Tensor,
    metadata: Mapping[str, Any],
    tolerance: float,
    any_length: bool = False,
) -> ExportedFile:
    """Export, add metadata, compare with `want`, and only then give the file its name."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _trace(module, example, temporary, given, result, any_length)
        model = onnx.load(temporary)
        entries = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        onnx.helper.set_model_props(model, entries)
        onnx.checker.check_model(model)
        onnx.save(model, temporary)
        deviation = float((_run(temporary, given, example) - want.detach()).abs().max())
        if not deviation <= tolerance:
            raise ConfigError(
                f"tolerance={tolerance:g}: {path.name} is {deviation:.1e} away from PyTorch, so "
                "it was not written; allow more, or report this encoder"
            )
    return ExportedFile(path, deviation)


def _trace(
    module: nn.Module, example: Tensor, path: Path, given: str, result: str, any_length: bool
) -> None:
    shapes = ({0: torch.export.Dim("rows")},) if any_length else None
    try:
        with warnings.catch_warnings(), quiet(), redirect_stdout(StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter speaks of its own future
            torch.onnx.export(
                module,
                (example,),
                str(path),
                input_names=[given],
                output_names=[result],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                dynamic_shapes=shapes,
            )
    except Exception as error:  # the exporter raises whatever a network leads it to
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error)
        raise EncoderError(f"this network cannot be exported to ONNX ({reason})") from error


def _run(path: Path, given: str, value: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(network.run(None, {given: value.numpy()})[0])


def sorted_rows(rows: Tensor, row_classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Text rows with those of a class side by side, as the graph wants them."""
    classes = torch.tensor(row_classes)
    order = classes.argsort(stable=True)
    return rows.cpu()[order], classes[order]
