"""Weights of an encoder: drawn from a seed, or read from a local file and loaded strictly."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from talk2dino.errors import DataError, EncoderError


def state_dict_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and persistent buffers, hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


class _Undrawn(TorchFunctionMode):
    """Leaves new parameters as they come from memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith(("uniform_", "normal_", "erfinv_")):  # also of torch.nn.init
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def seeded(draw: bool = True) -> Iterator[None]:
    """Draw random weights from a fixed seed, so that a spec with `random` names one network.

    Args:
        draw: without, which takes a third of the time or less, weights hold what the memory held,
            and nothing may be computed before `load_strictly`.
    """
    with torch.random.fork_rng(devices=[]), nullcontext() if draw else _Undrawn():
        torch.manual_seed(0)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logging where a library prints the error that we raise as one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]}…"


def read_state_dict(path: Path, key: str) -> dict[str, Any]:
    """Read a `.safetensors` file or a `.pth` file (tensors only, never pickled objects).

    Args:
        path: the file; a state dict under `state_dict` or `model` is unwrapped.
        key: config key that named it, for the messages.

    Raises:
        EncoderError: no such file, or not a file of weights.
    """
    if not path.is_file():
        raise EncoderError(f"{key}={str(path)!r}: no such file; use hub, bundled, random or a path")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of something else fails in any way at all
        raise EncoderError(
            f"{key}={str(path)!r}: not a file of weights ({type(error).__name__}); "
            "give a .safetensors file or a .pth file that holds tensors only"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise EncoderError(
            f"{key}={str(path)!r}: holds a {type(state).__name__}, expected a state dict"
        )
    return dict(state)


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], key: str, value: str, ignore: str = ""
) -> None:
    """Load a state dict of which every name and shape must fit.

    Args:
        model: network to fill.
        state: names and tensors.
        key: config key, for the message.
        value: value of that key, for the message.
        ignore: prefix of the classifier, whose weights may lie in the file without being used.

    Raises:
        EncoderError: one line with the first names that are missing, unknown, or misshapen.
    """
    wanted = model.state_dict()
    given = {n: t for n, t in state.items() if not (ignore and n.startswith(f"{ignore}."))}
    given |= {n: state[n] for n in wanted if n in state}
    missing = [n for n in wanted if n not in given]
    unknown = [n for n in given if n not in wanted]
    shapes = [
        f"{n} {tuple(given[n].shape)} instead of {tuple(wanted[n].shape)}"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", shapes))
        if names
    ]
    if problems:
        raise EncoderError(
            f"{key}={value!r}: these weights belong to another model: {'; '.join(problems)}"
        )
    model.load_state_dict(given)


def load_tensors(file: Path | BinaryIO, where: str) -> Any:
    """What `torch.save` wrote, tensors and plain values only; a path is memory-mapped.

    Raises:
        DataError: damaged, or holds objects that only running foreign code could restore.
    """
    try:
        if isinstance(file, Path) and zipfile.is_zipfile(file):  # torch before 1.6 wrote others
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        reason = first_line(error, 120)
        raise DataError(f"{where}: cannot be loaded safely ({reason})") from error
