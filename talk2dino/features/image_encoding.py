"""A batch of images through the vision encoder, and the chosen fields back to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.encoders.precision import autocast
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import first_line
from talk2dino.errors import ConfigError
from talk2dino.features.image_fields import select_fields


@dataclass(frozen=True)
class HostFields:
    """Fields of a batch on the host, complete once `ready` has happened."""

    tensors: dict[str, Tensor]
    ready: torch.cuda.Event | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Wait for the copies; each field [B, ...]."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class ImageEncoding:
    """The vision encoder with everything that decides what is kept of an image.

    Args:
        vision: the encoder on its device.
        names: fields to keep, out of `IMAGE_CHOICES`.
        dtype: of the kept features, `float16` or `float32`; the device converts, so that half as
            much travels to the host.
        precision: of the forward pass, a key of `PRECISIONS`.
        patches_per_image: keep so many patches of each image; None keeps all.
        compiled: translate the encoder with `torch.compile`; every batch is then filled up to the
            encoder's batch size.

    Raises:
        ConfigError: `compiled` where torch finds no compiler.
    """

    def __init__(
        self,
        vision: TimmVisionEncoder,
        names: Sequence[str],
        dtype: str,
        precision: str = "32",
        patches_per_image: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.vision, self.names, self.precision = vision, names, precision
        self.dtype = {"float16": torch.float16, "float32": torch.float32}[dtype]
        self.patches_per_image, self.compiled = patches_per_image, compiled
        self.device: torch.device = next(vision.parameters()).device
        if compiled:
            self._compile()

    def start(self, pixels: Tensor, image_ids: Sequence[int]) -> HostFields:
        """Encode [B, 3, S, S] uint8 images; a GPU may still be at work when this returns."""
        count = len(pixels)
        if self.compiled and count < self.vision.batch_size:  # a new size is translated anew
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self.vision.batch_size - count))
            image_ids = [*image_ids, *[0] * (self.vision.batch_size - count)]
        with torch.inference_mode():
            images = pixels.to(self.device, non_blocking=True).float().div_(255)
            with autocast(self.precision, self.device):
                features = self.vision(images)
            fields = select_fields(features, self.names, image_ids, self.patches_per_image)
            # Asynchronous copies from CUDA land in pinned memory; other devices have no event here.
            host = {
                name: self._stored(values[:count]).to("cpu", non_blocking=images.is_cuda)
                for name, values in fields.items()
            }
        if not images.is_cuda:
            return HostFields(host)
        return HostFields(host, torch.cuda.current_stream(self.device).record_event())

    def nothing(self) -> dict[str, NDArray[Any]]:
        """Every field with its shape and no row."""
        side = self.vision.image_size
        blank = self.start(torch.zeros(1, 3, side, side, dtype=torch.uint8), [0])
        return {name: values[:0] for name, values in blank.arrays().items()}

    def _stored(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if values.is_floating_point() else values

    def _compile(self) -> None:
        """Translate now, so that a missing compiler is reported before anything is decoded."""
        self.vision.compile_blocks()
        try:
            self.nothing()
        except Exception as error:  # torch wraps whatever its compiler said
            raise ConfigError(
                f"compile=true: torch cannot compile the encoder here ({first_line(error)}); "
                "install a C++ compiler or use compile=false"
            ) from error
