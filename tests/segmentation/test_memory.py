"""Arrays that are used again."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from talk2dino.segmentation import PAMR
from talk2dino.segmentation.memory import Memory


def test_an_array_that_fits_is_used_again() -> None:
    memory = Memory()
    small, large = memory.take(10), memory.take(100)
    assert (len(small), len(large)) == (10, 100) and small.dtype == np.float32
    assert small.ctypes.data % 64 == large.ctypes.data % 64 == 0
    memory.give(large)
    memory.give(small)
    assert memory.take(7).ctypes.data == small.ctypes.data
    assert memory.take(7).ctypes.data == large.ctypes.data


def test_a_large_array_stays_large_when_a_part_of_it_was_used() -> None:
    memory = Memory()
    large = memory.take(1000)
    memory.give(large)
    memory.give(memory.take(10))
    assert memory.take(1000).ctypes.data == large.ctypes.data


def test_one_that_is_too_small_is_replaced() -> None:
    memory = Memory()
    memory.give(memory.take(10))
    memory.give(memory.take(1000))
    assert len(memory.take(600)) == 600
    assert not memory._free


def test_copies_start_empty() -> None:
    refine = PAMR()
    refine(torch.rand(1, 3, 20, 20), torch.rand(1, 2, 5, 5))
    for copied in (copy.deepcopy(refine), pickle.loads(pickle.dumps(refine))):
        assert copied.dilations == refine.dilations
        assert not copied._memory._free


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs the extra fast")
def test_weights_stay_as_long_as_somebody_refines_with_them() -> None:
    images, mask = torch.rand(8, 3, 24, 30), torch.rand(2, 5, 5)
    refine = PAMR(3, (1, 4))
    kept = next(iter(refine.prepare(images[:1])))
    want = kept(mask)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda image: refine(image[None], mask[None]), images))
    assert torch.equal(kept(mask), want)
    held = len(refine._memory._free)
    del kept
    assert len(refine._memory._free) == held + 1


def test_nothing_is_kept_where_nothing_is_refined() -> None:
    refine = PAMR(num_iter=0)
    refine(torch.rand(1, 3, 20, 20), torch.rand(1, 2, 5, 5))
    assert not refine._memory._free
