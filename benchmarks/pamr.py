"""How long mask refinement takes, beside the usual way of computing it.

    python benchmarks/pamr.py --size 448 --classes 21 30 80 171
    python benchmarks/pamr.py --without-usual  # minutes faster: library calls are the baseline

The usual way copies all neighbors of every class, `[B, C, 48, H, W]`, by dilated convolutions with
one-hot kernels, multiplies and sums, ten times over; and since that array is large, it does so for
30 classes at a time and computes the affinity again for every chunk. It is written out here from
that description, and both ways of `PAMR` are checked against it in every run: library calls
(`gather`) and, where Numba is installed, compiled code. All are timed in turns.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.segmentation.refinement.pamr import PAMR, RING, Gather

DILATIONS = (1, 2, 4, 8, 12, 24)
CHUNK = 30
RATIO, DEVIATION = 50, 1e-5  # what is to be reached


def neighbor_copies(maps: Tensor, kernels: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, len(kernels) * len(DILATIONS), H, W]`."""
    batch, channels, height, width = maps.shape
    flat = maps.reshape(batch * channels, 1, height, width)
    kernels = kernels.to(maps)
    copies = [
        F.conv2d(F.pad(flat, (d,) * 4, mode="replicate"), kernels, dilation=d) for d in DILATIONS
    ]
    return torch.cat(copies, 1).view(batch, channels, -1, height, width)


def one_hot_kernels(offsets: list[tuple[int, int]], subtract_center: bool) -> Tensor:
    kernels = torch.zeros(len(offsets), 1, 3, 3)
    for kernel, (dy, dx) in zip(kernels, offsets, strict=True):
        kernel[0, 1 + dy, 1 + dx] += 1
        if subtract_center:
            kernel[0, 1, 1] -= 1
    return kernels


def usual_refinement(image: Tensor, mask: Tensor, num_iter: int) -> Tensor:
    """The usual implementation for one chunk of classes."""
    ring = list(RING)
    mask = F.interpolate(mask, size=image.shape[-2:], mode="bilinear", align_corners=True)
    difference = neighbor_copies(image, one_hot_kernels(ring, True)).abs()  # [B, 3, 48, H, W]
    samples = neighbor_copies(image, one_hot_kernels([*ring, (0, 0)], False))
    deviation = samples.std(2, keepdim=True)
    logits = -difference / (1e-8 + 0.1 * deviation)
    weights = logits.mean(1, keepdim=True).softmax(2)  # [B, 1, 48, H, W]
    kernels = one_hot_kernels(ring, False)
    for _ in range(num_iter):
        mask = (neighbor_copies(mask, kernels) * weights).sum(2)
    return mask


def usual(image: Tensor, mask: Tensor, num_iter: int) -> Tensor:
    chunks = mask.split(CHUNK, dim=1)
    return torch.cat([usual_refinement(image, chunk, num_iter) for chunk in chunks], 1)


def scene(size: int, classes: int) -> tuple[Tensor, Tensor]:
    """A picture with edges and texture, and soft masks at token resolution."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 3, size // 32 + 1, size // 32 + 1, generator=generator)
    picture = F.interpolate(blocks, size=(size, size), mode="nearest") * 200
    picture += 25 * torch.rand(1, 3, size, size, generator=generator)
    return picture.floor(), torch.rand(1, classes, 32, 32, generator=generator)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ways(num_iter: int) -> dict[str, PAMR]:
    """PAMR by library calls and, where it can be, compiled."""
    found = {"gather": PAMR(num_iter, DILATIONS, compiled=False)}
    compiled = PAMR(num_iter, DILATIONS)
    if not isinstance(compiled.engine(torch.device("cpu")), Gather):
        found["compiled"] = compiled
    return found


def peak_megabytes() -> float:
    # Not getrusage: its maximum survives exec, so a child would report its parent's peak.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) / 1024
    return float("nan")


def measure_memory(which: str, size: int, classes: int, num_iter: int) -> None:
    """Child process: print how far the peak rises above the inputs, in MB."""
    image, mask = scene(size, classes)
    if which != "usual":
        ways(1)[which](*scene(64, classes))  # libraries loaded before the baseline is read
    gc.collect()
    before = peak_megabytes()
    if which == "usual":
        usual(image, mask, num_iter)
    else:
        ways(num_iter)[which](image, mask)
    print(peak_megabytes() - before)


def memory(which: str, size: int, classes: int) -> float:
    if not Path("/proc/self/status").exists():  # Linux only
        return float("nan")
    command = [sys.executable, __file__, "--memory-of", which, "--size", str(size)]
    command += ["--classes", str(classes), "--iterations", "1"]  # iterations reuse memory
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def compare(size: int, classes: int, num_iter: int, repeats: int, with_usual: bool) -> None:
    image, mask = scene(size, classes)
    ours = ways(num_iter)
    best = {name: float("inf") for name in ours}
    results = {name: refine(image, mask) for name, refine in ours.items()}  # compiles

    def in_turns() -> None:
        for _ in range(repeats):
            for name, refine in ours.items():
                best[name] = min(best[name], seconds(lambda: refine(image, mask)))  # noqa: B023

    in_turns()
    reference, theirs = results["gather"], float("inf")
    if with_usual:
        start = time.perf_counter()
        reference = usual(image, mask, num_iter)
        theirs = time.perf_counter() - start
    in_turns()  # around the other, not before
    allowed = 3 * (48 + 2 * classes) * size * size * 4 / 2**20
    products = classes * 48 * size * size * num_iter
    if not with_usual:
        theirs = best["gather"]
    else:
        print(line(classes, "usual", theirs, 1, products, memory("usual", size, classes), 0.0))
    for name, result in results.items():
        deviation = float((result - reference).abs().max())
        ratio, megabytes = theirs / best[name], memory(name, size, classes)
        good = (
            (ratio >= RATIO or not with_usual)
            and not megabytes > allowed
            and deviation <= DEVIATION
        )
        text = line(classes, name, best[name], ratio, products, megabytes, deviation)
        print(f"{text} {allowed:8.0f}  {'met' if good else 'missed'}", flush=True)


def line(
    classes: int, name: str, time_: float, ratio: float, products: int, mb: float, deviation: float
) -> str:
    return (
        f"{classes:7d}  {name:<8} {time_:9.3f} {ratio:7.1f} {products / time_ / 1e9:7.1f} "
        f"{mb:8.0f} {deviation:10.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=448, help="side of the picture in pixels")
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 30, 80, 171])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the best counts")
    parser.add_argument("--without-usual", action="store_true", help="only compare our two ways")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory-of", choices=["usual", "gather", "compiled"], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        measure_memory(
            arguments.memory_of, arguments.size, arguments.classes[0], arguments.iterations
        )
        return
    print(
        f"PAMR at {arguments.size}x{arguments.size}, {arguments.iterations} iterations, "
        f"{arguments.threads} threads, CPU, torch {torch.__version__}"
    )
    print("classes  way        seconds   ratio  GFMA/s       MB  deviation  allowed  target")
    usual_too = not arguments.without_usual
    with torch.no_grad():
        for classes in arguments.classes:
            compare(arguments.size, classes, arguments.iterations, arguments.repeats, usual_too)


if __name__ == "__main__":
    main()
