"""The Triton kernels of PAMR: in Triton's interpreter, as machine code, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation import PAMR
from talk2dino.segmentation.refinement.pamr import Engine, Gather
from tests.helpers.goldens import golden_arrays, pamr_inputs

ROOT = Path(__file__).parents[2]


class ByTriton(PAMR):
    """With the kernels, whatever the device."""

    def engine(self, device: torch.device) -> Engine:
        from talk2dino.segmentation.refinement.pamr_triton import TritonEngine

        return TritonEngine(self.dilations)


def check_odd_pictures(refinement: type[PAMR], device: torch.device) -> None:
    """Against the library calls: neighbors beyond the border, blocks that are not full, views."""
    settings = 2, (1, 3, 20)
    plain, refine = PAMR(*settings, compiled=False), refinement(*settings)
    for height, width, classes in ((9, 14, 33), (1, 5, 4), (5, 1, 1), (1, 1, 2), (70, 65, 5)):
        image = 255 * torch.rand(1, 3, height, width)
        image[..., width // 2 :] = 77  # flat
        mask = torch.rand(1, classes, 5, 6)
        case = f"{height}x{width}, {classes} classes"
        close(refine(image.to(device), mask.to(device)), plain(image, mask), case)
        one = mask[..., :1, :1]
        close(refine(image.to(device), one.to(device)), plain(image, one), f"{case}, one token")
        large = torch.rand(1, classes, height, width)  # nothing to enlarge
        given = large.to(device)
        close(refine(image.to(device), given), plain(image, large), f"{case}, as large")
        close(given, large, f"{case}: the caller's scores")

    images = torch.rand(1, 40, 60, 3).permute(0, 3, 1, 2)  # no view of it is contiguous
    masks = torch.rand(12, 7, 1, 5).permute(2, 3, 0, 1)
    crop = images[..., 3:30:2, 5:44]
    got = refine(images.to(device)[..., 3:30:2, 5:44], masks.to(device)[:, 1::2])
    close(got, plain(crop, masks[:, 1::2]), "views")

    total, share = torch.rand(5, 40, 60), torch.rand(40, 60)  # a window of a picture
    there, whole = total.clone().to(device), share.to(device)
    for one, target, part in ((plain, total, share), (refine, there, whole)):
        at = target.device
        [prepared] = one.prepare([crop[0].to(at)])
        prepared.add_to(target[:, 20:34, 8:47], masks[0].to(at), part[20:34, 8:47])
    close(there, total, "a window of a picture")

    images = [torch.rand(3, 8, 9), torch.rand(3, 12, 4)]
    several = refine.prepare([one.to(device) for one in images])
    for prepared, one in zip(several, images, strict=True):
        got = prepared(masks[0].to(device))
        close(got, plain(one[None], masks)[0], f"one of several, {one.shape}")
    still = refinement(0)(images[0][None].to(device), masks.to(device))
    close(still, PAMR(0)(images[0][None], masks), "no iteration")


def check_parts_of_classes(refinement: type[PAMR], device: torch.device) -> None:
    """Equal classes get equal bits wherever they stand; larger scores nowhere smaller results."""
    from talk2dino.segmentation.refinement import pamr_triton

    image, mask = torch.rand(1, 3, 20, 21, device=device), torch.rand(1, 35, 20, 21, device=device)
    refine = refinement(3, (1, 4))
    whole = refine(image, mask)
    equal = refine(image, mask[:, :1].expand_as(mask))
    assert torch.equal(equal, equal[:, :1].expand_as(equal))
    assert (whole <= refine(image, mask.amax(1, keepdim=True))).all()
    kept, pamr_triton.HELD = pamr_triton.HELD, 10 * 20 * 21  # a group at a time
    try:
        assert torch.equal(refine(image, mask), whole)
    finally:
        pamr_triton.HELD = kept


def close(got: Tensor, want: Tensor, case: str = "") -> None:
    torch.testing.assert_close(
        got.cpu(), want, rtol=0, atol=1e-5, msg=lambda said: f"{case}: {said}"
    )


def interpreted() -> None:
    """All of it in the interpreter, which has to be asked for before the first import."""
    torch.manual_seed(0)
    cpu, arrays = torch.device("cpu"), golden_arrays("pamr")
    for name in ("40x56_c21_iter10", "40x56_c3_iter1_dil1_4", "flat24x20_c2_iter1_dil1_2"):
        image, mask, num_iter, dilations = pamr_inputs(name, arrays)
        close(ByTriton(num_iter, dilations)(image, mask), arrays[f"out/{name}"])
    check_odd_pictures(ByTriton, cpu)
    check_parts_of_classes(ByTriton, cpu)
    check_what_decides()


def check_what_decides() -> None:
    """`runs_on` takes kernels that agree with library calls, and no others."""
    from talk2dino.segmentation.refinement import pamr_triton as kernels

    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Triton 3.2's interpreter with NumPy from 1.25 on.
        warnings.filterwarnings("ignore", "Conversion of an array with ndim", DeprecationWarning)
        assert kernels.runs_on(cpu, PAMR().dilations)
    with pytest.MonkeyPatch.context() as patched, pytest.warns(UserWarning, match="from library"):
        patched.setattr(kernels, "on_device", lambda dilations, device: torch.tensor([2, 2]).int())
        assert not kernels.runs_on(cpu, (1, 4))
    with pytest.raises(DataError, match="more than 134,213,632 pixels"):
        kernels.TritonEngine((1,)).affinity(torch.zeros(1).expand(3, 1 << 14, 1 << 13))


def in_a_process(code: str, folder: Path, **variables: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = "from tests.segmentation.test_pamr_triton import interpreted; interpreted()"
    in_a_process(code, tmp_path, TRITON_INTERPRET="1")


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from talk2dino.segmentation.refinement.pamr_triton import BLOCK, TOGETHER, WEIGHED, average, weigh
pointers = dict(image="*fp32", values="*fp32", weights="*fp32", result="*fp32", dilations="*i32")
constants = {"BLOCK": BLOCK, "TOGETHER": TOGETHER}, {"BLOCK": WEIGHED, "WIDEST": 64}
for kernel, sizes in zip((average, weigh), constants):
    kinds = {name: pointers.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
        sizes, "constexpr"
    )
    for capability in (80, 90):
        made = compile(ASTSource(kernel, kinds, sizes), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.2")
    in_a_process(COMPILED, tmp_path)


def test_without_what_triton_needs_library_calls_are_used() -> None:
    """Here it has no GPU at all."""
    kernels = pytest.importorskip("talk2dino.segmentation.refinement.pamr_triton")
    if torch.cuda.is_available():
        pytest.skip("Triton has what it needs")
    kernels.runs_on.cache_clear()
    with pytest.warns(UserWarning, match="library calls give the same results"):
        engine = PAMR().engine(torch.device("cuda", 0))
    assert isinstance(engine, Gather)
    assert isinstance(PAMR().engine(torch.device("cuda", 0)), Gather)  # said once
    kernels.runs_on.cache_clear()


@pytest.mark.gpu
def test_odd_pictures_on_gpu(gpu: torch.device) -> None:
    if gpu.type == "cuda":
        kernels = pytest.importorskip("talk2dino.segmentation.refinement.pamr_triton")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # says why not
            kernels.runs_on.cache_clear()
            engine = PAMR().engine(torch.device("cuda", 0))
        assert isinstance(engine, kernels.TritonEngine)
    check_odd_pictures(PAMR, gpu)


@pytest.mark.gpu
def test_parts_of_classes_on_gpu(gpu: torch.device) -> None:
    pytest.importorskip("triton")
    check_parts_of_classes(PAMR, gpu)


@pytest.mark.gpu
def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    image, mask = torch.rand(1, 3, 9, 14), torch.rand(1, 4, 5, 6)
    got = PAMR(2)(image.to("cuda:1"), mask.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    close(got, PAMR(2, compiled=False)(image, mask))
