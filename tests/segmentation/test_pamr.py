"""PAMR against the original's arrays, a brute-force twin and what must hold for any picture."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from talk2dino.errors import UserError
from talk2dino.segmentation import PAMR
from talk2dino.segmentation.refinement.pamr import Gather, affinity, neighbors
from tests.helpers.goldens import PAMR_CASES, Golden, pamr_inputs
from tests.helpers.parity import ParityRecord

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs the extra fast"
)
WAYS = [False, pytest.param(True, marks=needs_numba)]


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that tensors on the CPU grew at any moment of `action`, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: float(event["ts"]))
    held = peak = 0
    for event in memory:
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("name", PAMR_CASES)
def test_original(name: str, compiled: bool, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("pamr")
    image, mask, num_iter, dilations = pamr_inputs(name, arrays)
    parity.check(
        part="mask refinement",
        original="PAMR.forward",
        got=PAMR(num_iter, dilations, compiled)(image, mask),
        want=arrays[f"out/{name}"],
        tolerance=1e-5,
    )


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("dilations", [(1,), (1, 2)])
def test_affinity(
    dilations: tuple[int, ...], compiled: bool, golden: Golden, parity: ParityRecord
) -> None:
    arrays = golden("pamr")
    name = "out/flat24x20_c2_iter1_dil" + "_".join(map(str, dilations)) + "__affinity"
    want = arrays[name][0, 0].flatten(1)
    engine = PAMR(1, dilations, compiled).engine(torch.device("cpu"))
    got = engine.affinity(arrays["image/flat24x20"][0])
    if compiled:  # [H, N / 8, W, 8]
        got = got.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    parity.check("mask refinement affinity", "LocalAffinity", got.t(), want, 1e-6)


def brute_force(image: Tensor, mask: Tensor, num_iter: int, dilations: tuple[int, ...]) -> Tensor:
    """Pixel by pixel in double precision, straight from the definition: [3,H,W], [C,H,W]."""
    _, height, width = image.shape
    image, mask = image.double(), mask.double()

    def around(y: int, x: int, center: bool) -> list[tuple[int, int]]:
        return [
            (min(max(y + d * dy, 0), height - 1), min(max(x + d * dx, 0), width - 1))
            for d in dilations
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if center or dy or dx
        ]

    def look(maps: Tensor, places: list[tuple[int, int]]) -> Tensor:
        return torch.stack([maps[:, y, x] for y, x in places], 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            std = look(image, around(y, x, True)).std(1, keepdim=True)
            difference = (look(image, around(y, x, False)) - image[:, y, x, None]).abs()
            weights[y, x] = (-difference / (1e-8 + 0.1 * std)).mean(0).softmax(0)
    for _ in range(num_iter):
        refined = torch.empty_like(mask)
        for (y, x), weight in weights.items():
            refined[:, y, x] = look(mask, around(y, x, False)) @ weight
        mask = refined
    return mask.float()


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("size", [(9, 14), (3, 2), (1, 5)])
def test_brute_force_twin_with_neighbors_beyond_the_border(
    size: tuple[int, int], compiled: bool
) -> None:
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    mask = torch.rand(2, 4, *size)
    got = PAMR(3, (1, 3, 20), compiled)(image, mask)
    for one, picture, values in zip(got, image, mask, strict=True):
        torch.testing.assert_close(one, brute_force(picture, values, 3, (1, 3, 20)))


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 37, 21)
    whole = affinity(image, (1, 4))
    monkeypatch.setattr("talk2dino.segmentation.refinement.pamr.STRIP", 100)
    torch.testing.assert_close(affinity(image, (1, 4)), whole, rtol=0, atol=1e-6)


def test_rows_sum_to_one_and_indices_stay_inside() -> None:
    image = torch.rand(3, 12, 7)
    assert torch.allclose(affinity(image, (1, 5)).sum(1), torch.ones(84), atol=1e-6)
    index = neighbors(12, 7, (1, 5))
    assert index.shape == (84, 16) and index.dtype == torch.int32
    assert index.min() == 0 and index.max() == 83
    assert index[0, :8].tolist() == [0, 0, 1, 0, 1, 7, 7, 8]  # the corner repeats itself


def test_constant_mask_stays_and_range_never_grows() -> None:
    image = torch.rand(1, 3, 20, 20)
    refine = PAMR()
    torch.testing.assert_close(
        refine(image, torch.full((1, 2, 5, 5), 0.3)), torch.tensor(0.3).expand(1, 2, 20, 20)
    )
    mask = torch.rand(1, 2, 20, 20)
    out = refine(image, mask)
    assert out.min() >= mask.min() - 1e-6 and out.max() <= mask.max() + 1e-6


def test_a_strong_edge_is_not_crossed() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 200
    mask = torch.rand(1, 1, 16, 16)
    changed = mask.clone()
    changed[..., 8:] = 0.0
    refine = PAMR(10, (1, 2))
    # 1 / 0.1 std is at most e^-20 for a neighbor across the edge: the left half cannot tell
    torch.testing.assert_close(
        refine(image, mask)[..., :8], refine(image, changed)[..., :8], rtol=0, atol=1e-4
    )


def test_images_are_independent_and_inputs_untouched() -> None:
    image, mask = torch.rand(3, 3, 10, 12), torch.rand(3, 5, 4, 6)
    kept = image.clone(), mask.clone()
    refine = PAMR(4)
    together = refine(image, mask)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], refine(image[i : i + 1], mask[i : i + 1]))
    assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])
    assert not PAMR().state_dict() and not list(PAMR().parameters())


def test_copies_keep_their_settings() -> None:
    image, mask = torch.rand(1, 3, 20, 20), torch.rand(1, 2, 5, 5)
    refine = PAMR(3, (1, 2))
    want = refine(image, mask)
    for copied in (copy.deepcopy(refine), pickle.loads(pickle.dumps(refine))):
        assert torch.equal(copied(image, mask), want)


def test_weights_stay_as_long_as_somebody_refines_with_them() -> None:
    images, mask = torch.rand(8, 3, 24, 30), torch.rand(2, 5, 5)
    refine = PAMR(3, (1, 4))
    kept = next(iter(refine.prepare(images[:1])))
    want = kept(mask)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda image: refine(image[None], mask[None]), images))
    assert torch.equal(kept(mask), want)


def test_chunks_of_classes_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = torch.rand(1, 3, 18, 23), torch.rand(1, 11, 5, 6)
    refine = PAMR(3, (1, 4), compiled=False)
    whole = refine(image, mask)
    monkeypatch.setattr("talk2dino.segmentation.refinement.pamr.CLASSES", 4)
    torch.testing.assert_close(refine(image, mask), whole, rtol=0, atol=1e-6)


def test_one_after_the_other_with_different_sizes() -> None:
    images = [torch.rand(3, *size) for size in ((10, 12), (10, 12), (7, 20))]
    masks = [torch.rand(classes, 4, 6) for classes in (2, 3, 2)]
    refine = PAMR(3, (1, 2))
    for prepared, image, mask in zip(refine.prepare(images), images, masks, strict=True):
        assert torch.equal(prepared(mask), refine(image[None], mask[None])[0])


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("classes", [1, 21, 171])
def test_memory_stays_within_three_times_weights_and_scores(classes: int, compiled: bool) -> None:
    height, width = 192, 256
    image, mask = torch.rand(1, 3, height, width), torch.rand(1, classes, 8, 8)
    refine = PAMR(2, compiled=compiled)
    refine(image[..., :32, :32], mask)
    tracemalloc.start()  # NumPy's part; both peaks need not come at the same time
    try:
        refine(image, mask)
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    floats = (arrays + peak_bytes(lambda: refine(image, mask))) / 4
    assert floats <= 3 * (48 + 2 * classes) * height * width


@needs_numba
@pytest.mark.parametrize(
    ("size", "classes"), [((41, 67), 3), ((30, 150), 50), ((64, 64), 21), ((26, 7), 33)]
)
def test_compiled_agrees_with_library_calls(size: tuple[int, int], classes: int) -> None:
    """After one iteration to 1e-6; ten carry the rounding of either on."""
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    image[..., size[1] // 2 :] = 77  # flat: all weights are equal, all deviations zero
    mask = torch.rand(1, classes, 8, 9)
    for num_iter, tolerance in ((1, 1e-6), (10, 5e-6)):
        want = PAMR(num_iter, compiled=False)(image, mask)
        got = PAMR(num_iter)(image, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@needs_numba
@pytest.mark.parametrize("dilations", [(4,), (5,), (2, 2, 3), (6, 7), (1, 2, 3, 4, 5), (16, 1)])
def test_compiled_places_every_neighbor(dilations: tuple[int, ...]) -> None:
    image, mask = torch.rand(1, 3, 21, 37), torch.rand(1, 5, 21, 37)
    want = PAMR(1, dilations, compiled=False)(image, mask)
    torch.testing.assert_close(PAMR(1, dilations)(image, mask), want, rtol=0, atol=1e-6)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_numba
def test_compiled_chunks_threads_and_callers_do_not_show(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    image, mask = torch.rand(1, 3, 40, 101), torch.rand(1, 60, 5, 6)
    refine = PAMR(3, (1, 4))
    whole = refine(image, mask)
    torch.set_num_threads(1)
    assert torch.equal(refine(image, mask), whole)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(got, whole) for got in pool.map(refine, [image] * 8, [mask] * 8))
    for widest in (8, 16, 24, 32, 64):
        monkeypatch.setattr("talk2dino.segmentation.refinement.pamr_numba.TOGETHER", widest)
        assert torch.equal(refine(image, mask), whole)


@needs_numba
def test_compiled_equal_classes_get_equal_bits_wherever_they_stand() -> None:
    image, mask = torch.rand(1, 3, 40, 51), torch.rand(1, 1, 5, 6).expand(1, 61, 5, 6)
    refined = PAMR(3, (1, 4))(image, mask)
    assert torch.equal(refined, refined[:, :1].expand_as(refined))


@needs_numba
def test_compiled_larger_scores_give_nowhere_smaller_results() -> None:
    """What the bounds of `segmentation/labels.py` rest on, to the bit."""
    image, mask = torch.rand(1, 3, 40, 51), torch.rand(1, 20, 5, 6)
    refine = PAMR(10, (1, 4))
    bound = refine(image, mask.amax(1, keepdim=True))
    assert (refine(image, mask) <= bound).all()


@needs_numba
def test_compiled_power_against_double_precision() -> None:
    from talk2dino.segmentation.refinement.pamr_numba import compiled, exp2

    @compiled
    def all_powers(values: Any, result: Any) -> None:
        for place in range(len(values)):
            result[place] = exp2(values[place])

    values = np.concatenate([np.linspace(-114, 0, 4096), [-1e9] * 15, [0]]).astype(np.float32)
    got = np.empty_like(values)
    all_powers(values, got)
    exact = np.exp2(values[:4096].astype(np.float64))
    assert np.abs(got[:4096] / exact - 1).max() < 2.5e-7
    assert got[-1] == 1 and got[-2] > 0


@needs_numba
def test_without_a_folder_for_the_cache_it_is_compiled_anyway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talk2dino.segmentation.refinement import pamr_numba

    def no_folder(cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(pamr_numba, "njit", no_folder)
    assert pamr_numba.compiled(len) is len


def test_without_numba_or_off_the_cpu_library_calls_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(PAMR().engine(torch.device("meta")), Gather)
    name = "talk2dino.segmentation.refinement.pamr_numba"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert isinstance(PAMR().engine(torch.device("cpu")), Gather)
    image, mask = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9)
    assert torch.equal(PAMR(2)(image, mask), PAMR(2, compiled=False)(image, mask))


def test_no_iterations_only_resize() -> None:
    image, mask = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 3, 3)
    want = F.interpolate(mask, size=(9, 9), mode="bilinear", align_corners=True)
    assert torch.equal(PAMR(num_iter=0)(image, mask), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_refined_in_float32(dtype: torch.dtype) -> None:
    image, mask = torch.rand(1, 3, 9, 9).to(dtype), torch.rand(1, 2, 9, 9).to(dtype)
    want = PAMR()(image.float(), mask.float())
    assert torch.equal(PAMR()(image, mask), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PAMR()(image, mask), want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAMR_CASES)
def test_original_on_gpu(name: str, golden: Golden, gpu: torch.device) -> None:
    arrays = golden("pamr")
    image, mask, num_iter, dilations = pamr_inputs(name, arrays)
    got = PAMR(num_iter, dilations, compiled=False)(image.to(gpu), mask.to(gpu))
    assert got.device.type == gpu.type
    torch.testing.assert_close(got.cpu(), arrays[f"out/{name}"], rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_gpu_agrees_in_chunks_of_classes_and_strips(gpu: torch.device) -> None:
    """Where a picture is larger than a strip and has more classes than go together."""
    image = torch.randint(0, 256, (2, 3, 150, 130), dtype=torch.uint8)
    mask = torch.rand(2, 61, 10, 8)
    want, got = PAMR(compiled=False)(image, mask), PAMR()(image.to(gpu), mask.to(gpu))
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_gpu_keeps_what_the_bounds_of_labels_rest_on(gpu: torch.device) -> None:
    """Equal classes get equal bits wherever they stand; larger scores nowhere smaller results."""
    image, mask = torch.rand(1, 3, 40, 51, device=gpu), torch.rand(1, 61, 5, 6, device=gpu)
    refine = PAMR(10, (1, 4))
    refined = refine(image, mask[:, :1].expand_as(mask))
    assert torch.equal(refined, refined[:, :1].expand_as(refined))
    assert (refine(image, mask) <= refine(image, mask.amax(1, keepdim=True))).all()


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: PAMR(num_iter=-1), "pamr.num_iter=-1"),
        (lambda: PAMR(dilations=()), "pamr.dilations"),
        (lambda: PAMR(dilations=(1, 0)), "pamr.dilations"),
        (lambda: PAMR()(torch.rand(3, 8, 8), torch.rand(1, 2, 8, 8)), r"\(3, 8, 8\)"),
        (lambda: PAMR()(torch.rand(2, 3, 8, 8), torch.rand(1, 2, 8, 8)), "same B"),
    ],
)
def test_bad_input(action: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        action()
