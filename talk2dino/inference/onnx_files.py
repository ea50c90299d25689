"""Modules as ONNX files: traced, described, compared with PyTorch, and only then named."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talk2dino.encoders.weights import first_line, quiet
from talk2dino.errors import ConfigError, EncoderError, require_extra
from talk2dino.files import replacing

OPSET = 18
LARGEST = 1_900_000_000  # bytes of weights in one file; protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportedFile:
    """What was written and how far it is from PyTorch.

    Attributes:
        path: the `.onnx` file.
        deviation: largest absolute difference of an output.
    """

    path: Path
    deviation: float


@dataclass(frozen=True)
class Graph:
    """A module and what it is traced and compared with.

    Attributes:
        module: takes the inputs in their order, gives one tensor.
        inputs: by name, example tensors.
        output: name of the result.
        want: the result for these inputs, computed without the module.
        metadata: JSON values for the file's `metadata_props`.
        free: axes of any length, by input: `{"embedding": {0: "rows"}}`.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    output: str
    want: Tensor
    metadata: Mapping[str, Any]
    free: Mapping[str, Mapping[int, str]] | None = None


def check_weights(key: str, encoder: nn.Module) -> None:
    """Refuse an encoder of more than `LARGEST` bytes, which do not fit one file (ConfigError)."""
    weights = sum(p.numel() * 4 for p in encoder.parameters())
    if weights > LARGEST:
        raise ConfigError(
            f"{key}.name={getattr(encoder, 'name', '')}: {weights / 1e9:.1f} GB of weights do not "
            "fit one ONNX file; choose a smaller encoder"
        )


def is_our_file(path: Path) -> bool:
    """Whether `write_graph` or `write_int8` wrote a file: by the metadata, which no other has."""
    import onnx

    try:
        entries = onnx.load(path, load_external_data=False).metadata_props
    except Exception:  # somebody's, of whatever kind
        return False
    return {"vision", "text", "templates", "checkpoint"} <= {entry.key for entry in entries}


def write_graph(path: Path, graph: Graph, tolerance: float) -> ExportedFile:
    """Trace, add the metadata, compare with `want`, and only then give the file its name.

    Raises:
        EncoderError: the network cannot be exported.
        ConfigError: an absent package, or a deviation beyond the tolerance.
    """
    require_extra("export", "export")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _trace(graph, temporary)
        _describe(temporary, graph.metadata)
        return ExportedFile(path, _compare(path, temporary, graph, tolerance, "tolerance"))


def write_int8(path: Path, source: Path, graph: Graph, tolerance: float) -> ExportedFile:
    """A file of `write_graph` with weight matrices of 8 bits; activations are quantized on the way.

    Products of two activations stay float32: attention, and patch tokens with class embeddings.

    Args:
        path: to write.
        source: the float32 file.
        graph: that it holds.
        tolerance: largest difference from PyTorch that is accepted.

    Raises:
        ConfigError: a deviation beyond the tolerance.
        EncoderError: the file is no smaller, as those of PyTorch 2.6.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with replacing(path) as temporary, quiet():
        quantize_dynamic(
            onnx.load(source),  # beside a path it would write, and remove, NAME-inferred.onnx
            temporary,
            op_types_to_quantize=["MatMul"],  # patches are cut by a convolution: 8 bits slow it
            per_channel=True,
            reduce_range=True,  # weights of 7 bits: sums of 8 overflow on CPUs without VNNI
            weight_type=QuantType.QInt8,
        )
        if temporary.stat().st_size > 0.9 * source.stat().st_size:
            raise EncoderError(
                f"int8=true: nothing that PyTorch {torch.__version__} writes of this network can "
                "be quantized; use a later PyTorch, or int8=false"
            )
        _describe(temporary, {**graph.metadata, "weights": "int8"})
        return ExportedFile(path, _compare(path, temporary, graph, tolerance, "int8_tolerance"))


def _describe(path: Path, metadata: Mapping[str, Any]) -> None:
    import onnx

    model = onnx.load(path)
    entries = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    onnx.helper.set_model_props(model, entries)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _compare(path: Path, written: Path, graph: Graph, tolerance: float, key: str) -> float:
    deviation = float((run_file(written, graph.inputs) - graph.want.detach()).abs().max())
    if not deviation <= tolerance:
        raise ConfigError(
            f"{key}={tolerance:g}: {path.name} is {deviation:.1e} away from PyTorch, so it was not "
            "written; allow more, or report this encoder"
        )
    return deviation


def _trace(graph: Graph, path: Path) -> None:
    shapes = None
    if graph.free:
        names = {name for axes in graph.free.values() for name in axes.values()}
        dims = {name: torch.export.Dim(name) for name in names}
        free = {k: {axis: dims[n] for axis, n in axes.items()} for k, axes in graph.free.items()}
        shapes = tuple(free.get(name) for name in graph.inputs)
    try:
        with warnings.catch_warnings(), quiet(), redirect_stdout(StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter speaks of its own future
            torch.onnx.export(
                graph.module,
                tuple(graph.inputs.values()),
                str(path),
                input_names=list(graph.inputs),
                output_names=[graph.output],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                dynamic_shapes=shapes,
            )
    except Exception as error:  # the exporter raises whatever a network leads it to
        raise EncoderError(
            f"this network cannot be exported to ONNX ({first_line(error, 160)})"
        ) from error


def run_file(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first output of a file for these inputs, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(network.run(None, values)[0])
