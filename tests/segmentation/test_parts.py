"""Parts of equal size."""

from __future__ import annotations

from itertools import pairwise

import pytest

from talk2dino.segmentation.parts import equal_parts


@pytest.mark.parametrize("count", [0, 1, 7, 32, 33, 66, 171])
@pytest.mark.parametrize("most", [1, 4, 32, 1000])
def test_few_parts_of_nearly_equal_size_cover_everything(count: int, most: int) -> None:
    parts = equal_parts(count, most)
    assert len(parts) == (count + most - 1) // most
    assert sum(stop - start for start, stop in parts) == count
    if parts:
        assert parts[0][0] == 0 and parts[-1][1] == count
        assert all(one[1] == other[0] for one, other in pairwise(parts))
        sizes = [stop - start for start, stop in parts]
        assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
