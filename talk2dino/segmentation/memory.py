"""Working memory of a segmentation, beforehand: what it takes, and whether the machine has it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from talk2dino.errors import DataError
from talk2dino.segmentation.class_maps import WORKING_MEMORY
from talk2dino.segmentation.portions import TOGETHER
from talk2dino.segmentation.segmenter import Segmenter
from talk2dino.segmentation.windows import short_side_size, sliding_windows

GB = 1_000_000_000
LARGE = 2 * GB  # is said beforehand
PIXEL = 40  # bytes for each of the picture: decoding, labels, the largest picture made of them
TOKEN = 14  # numbers of an encoder's width that a token takes on its way through a block


@dataclass(frozen=True)
class WorkingMemory:
    """What segmenting one picture takes besides the model, in bytes.

    Attributes:
        picture: decoded, its labels, and the pictures made of them; grows with its pixels alone.
        encoder: a batch of windows; grows with the working size.
        scores: of tokens and, in blocks, of pixels at working size; with classes, PAMR too.
    """

    picture: int
    encoder: int
    scores: int

    @classmethod
    def of(cls, segmenter: Segmenter, size: tuple[int, int], classes: int) -> WorkingMemory:
        """Estimate.

        Args:
            segmenter: with the working size and the refinement.
            size: rows and columns of the picture.
            classes: text rows; 0 for the encoder alone.
        """
        protocol = segmenter.protocol
        working = short_side_size(*size, protocol.short_side, protocol.long_side)
        windows = sliding_windows(*working, protocol.window, protocol.stride)
        cells = (protocol.input_size // getattr(segmenter.vision, "patch_size", 1)) ** 2
        width = getattr(segmenter.vision, "embed_dim", None) or 1024
        pixels = working[0] * working[1]
        batch = min(len(windows), segmenter.window_batch_size)
        copies = 6 if protocol.background_cleaning else 3
        maps = min(4 * classes * pixels, max(WORKING_MEMORY, 4 * pixels))
        refined = 0
        if segmenter.pamr is not None and classes:
            side = (windows[0].y2 - windows[0].y1) * (windows[0].x2 - windows[0].x1)
            parts, part = (1, pixels) if segmenter.pamr.whole_image else (len(windows), side)
            kept = 8 * len(segmenter.pamr.dilations) + 4  # numbers a pixel, for all classes
            refined = 4 * part * (kept * parts + 2 * TOGETHER)
        return cls(
            picture=PIXEL * size[0] * size[1],
            encoder=4 * width * cells * (TOKEN * batch + len(windows)),
            scores=4 * copies * classes * len(windows) * cells + maps + maps // 4 + refined,
        )

    @property
    def total(self) -> int:
        """Bytes, not all of which are held at the same time."""
        return self.picture + self.encoder + self.scores

    def require(self, what: str) -> None:
        """Refuse what the machine has no memory for.

        Args:
            what: names the picture, for the message.

        Raises:
            DataError: with what would help.
        """
        there = machine_memory()
        if self.total <= there:
            return
        if self.picture >= max(self.encoder, self.scores):
            fix = "scale the picture down, or cut it into tiles"
        else:
            fix = "use a smaller short_side" + (
                ", fewer classes, or pamr=false" if self.scores > self.encoder else ""
            )
        raise DataError(
            f"{what}: takes about {self.total / GB:.1f} GB of memory, this machine has "
            f"{there / GB:.1f} GB; {fix}"
        )


def machine_memory() -> int:
    """Bytes that this process may use: the machine's, or fewer that its control group allows."""
    limits = [sys.maxsize]
    with suppress(AttributeError, ValueError, OSError):  # Windows does not say
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError):
        limits += _group_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return min(limits)


def _group_limits(groups: str, root: Path) -> Iterator[int]:
    """The limits of a process's control group and of all above it, versions 1 and 2."""
    for line in groups.splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        own = top / path.strip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # "max", or hidden in a container
                yield int((folder / name).read_text())
            if folder == top:
                break
