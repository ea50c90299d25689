"""Windows, stitching and the two resizes against mmsegmentation's and OpenCV's arrays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation import sliding_windows
from talk2dino.segmentation.labels import label_map
from talk2dino.segmentation.scores import resize_scores, with_background
from talk2dino.segmentation.windows import (
    Window,
    resize_image,
    short_side_size,
)
from tests.helpers.goldens import Golden
from tests.helpers.parity import ParityRecord
from tests.helpers.windows import slide, stitch

SIZES = (
    "small20x24",
    "narrow50x20",
    "flat20x50",
    "odd45x70",
    "tall100x33",
    "wide33x100",
    "edge47x49",
)


def test_window_lists_of_real_sizes(golden: Golden, parity: ParityRecord) -> None:
    lists = {k: v for k, v in golden("slide").items() if k.startswith("real_windows/")}
    assert len(lists) == 13
    for name, want in lists.items():
        height, width = map(int, name.split("/")[1].split("x"))
        got = torch.tensor(sliding_windows(height, width))
        parity.check("window positions", "EncoderDecoder.slide_inference", got, want, 0)


@pytest.mark.parametrize("size", SIZES)
def test_sliding_a_known_function(size: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("slide")
    weight, slope, threshold = arrays["W"], arrays["U"], float(arrays["bg_thresh"])
    image, target = arrays[f"{size}/image"][0], tuple(arrays[f"{size}/ori_size"].tolist())

    def function(window: Tensor) -> Tensor:
        rows, columns = (torch.arange(n) / 32 for n in window.shape[-2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return torch.einsum("kc,bchw->bkhw", weight, window) + torch.einsum(
            "kc,chw->khw", slope, place
        )

    original = "DINOTextSegInference"
    got = torch.tensor(sliding_windows(*image.shape[1:], 32, 16))
    parity.check("window positions", original, got, arrays[f"{size}/windows_y1x1y2x2"], 0)
    scores = slide(image, function, 32, 16)
    want = arrays[f"{size}/bg0/avg_logits"][0]
    parity.check("window averaging", original, scores, want, 1e-4)
    resized = resize_scores(scores, *target)
    for key, got in (("bg0", resized), ("bg1", with_background(resized, threshold))):
        if f"{size}/{key}/resized_logits" in arrays:
            want = arrays[f"{size}/{key}/resized_logits"][0]
            parity.check("scores at picture size", original, got, want, 1e-4)
    for key, background in (("bg0", None), ("bg1", threshold)):
        labels = label_map(scores, *target, background)
        parity.check("label map", original, labels, arrays[f"{size}/{key}/pred"], 0)


@pytest.mark.gpu
def test_pictures_and_labels_on_gpu(golden: Golden, gpu: torch.device) -> None:
    """Resizing is integer arithmetic: the same bits. Labels are the original's."""
    image = torch.randint(0, 256, (3, 45, 70), dtype=torch.uint8)
    for size in ((45, 70), (96, 149), (20, 31)):
        assert torch.equal(resize_image(image.to(gpu), *size).cpu(), resize_image(image, *size))
    arrays = golden("slide")
    for name in SIZES:
        scores = arrays[f"{name}/bg0/avg_logits"][0].to(gpu)
        target = tuple(arrays[f"{name}/ori_size"].tolist())
        for key, background in (("bg0", None), ("bg1", float(arrays["bg_thresh"]))):
            labels = label_map(scores, *target, background)
            assert torch.equal(labels.cpu(), arrays[f"{name}/{key}/pred"])


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (448, 448), (449, 1500), (95, 64)])
@pytest.mark.parametrize(("window", "stride"), [(448, 224), (32, 32), (64, 17)])
def test_windows_cover_every_pixel(size: tuple[int, int], window: int, stride: int) -> None:
    windows = sliding_windows(*size, window, stride)
    count = torch.zeros(size)
    for place in windows:
        place.crop(count).add_(1)
        assert place.y1 >= 0 and place.x1 >= 0 and place.y2 <= size[0] and place.x2 <= size[1]
    assert count.min() >= 1
    assert len({(p.y2 - p.y1, p.x2 - p.x1) for p in windows}) == 1
    assert len(set(windows)) == len(windows)


def test_a_function_of_pixels_alone_is_reproduced() -> None:
    image = torch.rand(3, 50, 71)
    torch.testing.assert_close(slide(image, lambda w: w * 2 - 1, 32, 16), image * 2 - 1)


def test_stitch_averages_overlaps() -> None:
    windows = [Window(0, 0, 2, 3), Window(0, 1, 2, 4)]
    values = [torch.full((1, 2, 3), 1.0), torch.full((1, 2, 3), 2.0)]
    assert stitch(values, windows, 2, 4)[0, 0].tolist() == [1.0, 1.5, 1.5, 2.0]


def test_label_map_in_chunks_equals_argmax_of_everything() -> None:
    scores = torch.rand(50, 9, 11)
    scores[40] = scores[3]  # equal scores in different chunks: the first wins
    whole = resize_scores(scores, 33, 20)
    assert torch.equal(label_map(scores, 33, 20), whole.argmax(0))
    for threshold in (-1.0, 0.9, 2.0):
        want = with_background(whole, threshold).argmax(0)
        assert torch.equal(label_map(scores, 33, 20, threshold), want)


def test_short_side_sizes(golden: Golden, parity: ParityRecord) -> None:
    for row in golden("pipeline_resize")["rescale_2048x448/h_w_newh_neww"]:
        got = torch.tensor(short_side_size(int(row[0]), int(row[1])))
        parity.check("working size", "mmcv.rescale_size", got, row[2:], 0)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (12000, 9000)])
def test_extreme_pictures_keep_at_least_a_pixel(size: tuple[int, int]) -> None:
    height, width = short_side_size(*size)
    assert 1 <= min(height, width) <= 448 and max(height, width) <= 2048


@pytest.mark.parametrize("case", ["down", "up", "long", "same"])
def test_resize_is_opencv_to_the_bit(case: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("pipeline_resize")
    image = arrays[f"pipeline/{case}/image_hwc_bgr_uint8"].to(torch.uint8).permute(2, 0, 1)
    short, long = sorted(arrays[f"pipeline/{case}/img_scale"].tolist())
    got = resize_image(image, *short_side_size(*image.shape[1:], short, long))
    want = arrays[f"pipeline/{case}/out_chw"]
    parity.check("image resize", "mmseg test pipeline (OpenCV)", got, want, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (30, 1), (29, 31), (200, 150)])
def test_resize_stays_within_a_grey_level_of_real_arithmetic(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, 41, 57), dtype=torch.uint8)
    want = torch.nn.functional.interpolate(image[None].double(), size, mode="bilinear")[0]
    got = resize_image(image, *size)
    assert got.dtype == torch.uint8
    assert (got.double() - want).abs().max() <= 1


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        (lambda: sliding_windows(10, 10, 4, 5), ConfigError, "stride=5, window=4"),
        (lambda: sliding_windows(10, 10, 4, 0), ConfigError, "stride=0"),
        (lambda: sliding_windows(0, 10), DataError, "0x10"),
        (lambda: resize_image(torch.rand(3, 4, 4), 2, 2), DataError, "float32"),
        (lambda: stitch([], [], 2, 2), DataError, "no windows"),
        (
            lambda: stitch([torch.rand(1, 3, 3)], [Window(0, 0, 2, 2)], 2, 2),
            DataError,
            r"\(1, 3, 3\)",
        ),
    ],
)
def test_bad_input(action: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        action()
