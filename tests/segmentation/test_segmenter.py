"""The chain from windows to labels, with an encoder whose features are fixed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation import KNN, PAMR, Segmenter, sliding_windows
from talk2dino.segmentation.labels import label_map
from talk2dino.segmentation.scores import class_scores, merge_synonyms
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures
from talk2dino.segmentation.windows import _axis
from tests.helpers.encoders import FixedEncoder, MeanColorEncoder
from tests.helpers.goldens import Golden
from tests.helpers.parity import ParityRecord
from tests.helpers.windows import golden_segmenters


@pytest.mark.parametrize("case", ["b1", "b2", "rawtext"])
def test_class_scores(case: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("masker_bgclean")
    features = arrays[f"masker/{case}/image_feat"]
    rows, columns = features.shape[-2:]
    tokens = features.flatten(2).transpose(1, 2)
    got = class_scores(tokens, arrays[f"masker/{case}/text_emb"], (rows, columns))
    want = arrays[f"masker/{case}/soft_mask"]
    parity.check("class scores", "DINOTextMasker.forward_seg", got, want, 1e-6)


def test_generate_masks(parity: ParityRecord) -> None:
    cases = list(golden_segmenters())
    assert len(cases) >= 12
    for case in cases:
        part = "window scores" + (" with refinement" if case.segmenter.pamr else "")
        got = case.scores(torch.device("cpu"))
        parity.check(part, "DINOText.generate_masks", got, case.want, 1e-5)


@pytest.mark.gpu
def test_generate_masks_on_gpu(gpu: torch.device) -> None:
    for case in golden_segmenters():
        torch.testing.assert_close(case.scores(gpu), case.want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_what_the_encoder_sees(antialias: bool, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("generate_masks")
    case = "wide48x72"
    encoder = FixedEncoder(arrays[f"{case}/patch_tokens"], arrays[f"{case}/self_attn_maps"])
    segmenter = Segmenter(encoder, input_size=56, antialias=antialias)
    segmenter.encode_windows(arrays[f"{case}/image_bgr"].flip(1))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    want = arrays[f"{case}/img_preprocessed_{'' if antialias else 'no'}antialias"]
    got = (encoder.seen[0] - mean) / std
    parity.check("encoder input", "DINOText image transform", got, want, 1e-5)


def colour_scene() -> tuple[Tensor, Tensor, Tensor]:
    """Red left, green right, blue below; the text rows are those colours."""
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)
    labels = torch.zeros(60, 100, dtype=torch.int64)
    labels[:, 50:], labels[40:] = 1, 2
    for k in range(3):
        image[k][labels == k] = 255
    text = F.normalize(torch.eye(3) - 0.5, dim=-1)
    return image, text, labels


def small_segmenter(**options: object) -> Segmenter:
    settings: dict[str, object] = {"window": 64, "stride": 32, "short_side": 64, "input_size": 64}
    return Segmenter(MeanColorEncoder(), **{**settings, **options})  # type: ignore[arg-type]


def test_colours_are_found_at_the_size_of_the_picture() -> None:
    image, text, labels = colour_scene()
    result = small_segmenter()(image, text)
    assert result.labels.shape == (60, 100) and result.labels.dtype == torch.int64
    assert result.scores is None
    assert (result.labels == labels).float().mean() > 0.9
    refined = small_segmenter(pamr=PAMR(10, (1, 2, 4)))(image, text)
    assert (refined.labels == labels).float().mean() > (result.labels == labels).float().mean()


def test_scores_agree_with_labels_and_start_with_the_background() -> None:
    image, text, _ = colour_scene()
    segmenter = small_segmenter(background_threshold=0.6)
    full = segmenter(image, text, return_scores=True)
    assert full.scores is not None and full.scores.shape == (4, 60, 100)
    assert (full.scores[0] == 0.6).all()
    assert torch.equal(full.scores.argmax(0), full.labels)
    assert torch.equal(segmenter(image, text).labels, full.labels)
    everything = small_segmenter(background_threshold=0.99)(image, text).labels
    assert (everything == 0).all()
    nothing = small_segmenter(background_threshold=0.0)(image, text).labels
    assert torch.equal(nothing, small_segmenter()(image, text).labels + 1)


ON_GPU = [
    {},
    {"background_threshold": 0.55, "background_cleaning": True},
    {"pamr": PAMR(4, (1, 2))},
    {"pamr": PAMR(4, (1, 2), whole_image=True)},
    {"knn": KNN(4)},
]


@contextmanager
def simulated_cuda() -> Iterator[None]:
    """Fake tensors have a device; PyTorch 2.6 asks for a driver even then, and skips the test."""
    try:
        with FakeTensorMode():
            yield
    except RuntimeError as error:
        if "NVIDIA driver" not in str(error) and "driver version" not in str(error):
            raise
        pytest.skip(f"PyTorch {torch.__version__} simulates no CUDA without a driver")
    finally:
        _axis.cache_clear()  # of matrices without numbers


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that knows CUDA")
@pytest.mark.parametrize("options", ON_GPU)
def test_scores_leave_nothing_on_the_cpu(options: dict[str, object]) -> None:
    """Without a GPU: fake tensors have a device, mix with no other and compute nothing."""
    segmenter = small_segmenter(**options)
    if segmenter.pamr is not None:  # kernels want real memory
        segmenter.pamr = PAMR(4, (1, 2), compiled=False, whole_image=segmenter.pamr.whole_image)
    windows = sliding_windows(64, 96, 64, 32)
    with simulated_cuda():
        count = len(windows)
        shapes = (count, 64, 3), (count, 2, 64), (3, 64, 96), (5, 3)
        tokens, maps, image, text = (torch.rand(*shape, device="cuda") for shape in shapes)
        seen = EncodedImage(image, windows, WindowFeatures(tokens, maps, (8, 8)), (60, 90))
        assert segmenter.scores(seen, text).device.type == "cuda"
        if segmenter.pamr is None:  # with it the scores decide what is refined
            assert segmenter.labels(seen, text).device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("options", ON_GPU)
def test_labels_on_gpu(options: dict[str, object], gpu: torch.device) -> None:
    """From an uint8 picture on the device, in several batches, with synonyms."""
    image, text, _ = colour_scene()
    image = image // 2 + torch.randint(0, 100, image.shape, dtype=torch.uint8)
    text, rows = torch.cat([text, text.roll(1, 0)]), torch.tensor([0, 1, 2, 3, 3, 0])
    segmenter = small_segmenter(short_side=96, window_batch_size=3, **options)
    want = segmenter(image, text, (70, 90), return_scores=True, row_classes=rows)
    segmenter.to(gpu)
    there = image.to(gpu), text.to(gpu), (70, 90)
    got = segmenter(*there, return_scores=True, row_classes=rows.to(gpu))
    assert want.scores is not None and got.scores is not None
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=0, atol=1e-5)
    short = segmenter(*there, row_classes=rows.to(gpu)).labels
    best = got.scores.gather(0, short[None])[0]
    torch.testing.assert_close(best, got.scores.amax(0), rtol=0, atol=1e-6)


def test_another_size_can_be_asked_for() -> None:
    image, text, _ = colour_scene()
    assert small_segmenter()(image, text, size=(31, 17)).labels.shape == (31, 17)


def test_windows_are_encoded_in_batches_and_batches_do_not_show() -> None:
    image, text, _ = colour_scene()
    options = {"background_cleaning": True, "pamr": PAMR(2, (1, 2)), "short_side": 96}
    one, many = (small_segmenter(window_batch_size=n, **options) for n in (1, 4))
    first = one(image, text, return_scores=True)
    second = many(image, text, return_scores=True)
    assert first.scores is not None and second.scores is not None
    torch.testing.assert_close(first.scores, second.scores)
    count = len(sliding_windows(96, 160, 64, 32))
    assert one.vision.batches == [1] * count
    assert many.vision.batches == [4] * (count // 4)


def test_encoded_once_scored_often() -> None:
    image, text, _ = colour_scene()
    segmenter = small_segmenter()
    encoded = segmenter.encode(image)
    calls = len(segmenter.vision.batches)
    for rows in (text, text[:2], text.flip(0)):
        labels = label_map(
            segmenter.scores(encoded, rows), *encoded.size, segmenter.background_threshold
        )
        assert len(segmenter.vision.batches) == calls
        assert torch.equal(labels, small_segmenter()(image, rows).labels)


def test_pictures_of_different_sizes_fill_the_batches_of_the_encoder() -> None:
    sizes = [(60, 100), (100, 60), (64, 64), (200, 64), (40, 300)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    segmenter = small_segmenter(window_batch_size=4, long_side=150)
    together = segmenter.encode_batch(images)
    count = sum(len(one.windows) for one in together)
    batches = segmenter.vision.batches
    assert sum(batches) == count and set(batches[:-1]) == {4} and batches[-1] <= 4
    for image, got in zip(images, together, strict=True):
        alone = small_segmenter(long_side=150).encode(image)
        assert got.size == alone.size == tuple(image.shape[-2:])
        assert got.windows == alone.windows and torch.equal(got.image, alone.image)
        torch.testing.assert_close(got.features.patch_tokens, alone.features.patch_tokens)
        torch.testing.assert_close(got.features.self_attn_maps, alone.features.self_attn_maps)
    assert segmenter.encode_batch([]) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"background_threshold": 0.55, "background_cleaning": True},
        {"pamr": PAMR(2, (1, 2))},
        {"pamr": PAMR(2, (1, 2), whole_image=True)},
        {"knn": KNN(4)},
    ],
)
def test_the_short_way_to_labels_gives_those_of_the_scores(options: dict[str, object]) -> None:
    image, text, _ = colour_scene()
    segmenter = small_segmenter(short_side=96, **options)
    encoded = segmenter.encode(image)
    for size in (None, (33, 150)):
        got = segmenter.labels(encoded, text, size)
        full = segmenter(image, text, size, return_scores=True).scores
        assert full is not None and got.shape == full.shape[1:]
        best = full.gather(0, got[None])[0]
        torch.testing.assert_close(best, full.amax(0), rtol=0, atol=1e-6)


def test_one_refinement_of_the_whole_picture_differs_only_if_windows_overlap() -> None:
    image, text, _ = colour_scene()
    one, every = (
        small_segmenter(pamr=PAMR(3, (1, 2), whole_image=whole), background_cleaning=True)
        for whole in (True, False)
    )
    square = image[:, :, 20:80]
    scores = [it.scores(it.encode(square), text) for it in (one, every)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
    scores = [it.scores(it.encode(image), text) for it in (one, every)]
    assert 1e-4 < (scores[0] - scores[1]).abs().max() < 0.1


def test_knn_sees_the_tokens_of_the_encoder() -> None:
    image, text, _ = colour_scene()
    plain, refined = small_segmenter(), small_segmenter(knn=KNN(3, 2))
    encoded = plain.encode(image)
    want = KNN(3, 2)(
        encoded.features.patch_tokens, plain.token_scores(encoded.features, text, None)
    )
    assert torch.equal(refined.token_scores(encoded.features, text, None), want)


def test_surrounding_autocast_reaches_the_encoder_alone() -> None:
    image, text, _ = colour_scene()
    segmenter = small_segmenter(background_cleaning=True, knn=KNN(3), short_side=96)
    encoded = segmenter.encode(image)
    want = segmenter.scores(encoded, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(segmenter.scores(encoded, text), want)
        assert torch.equal(
            segmenter.labels(encoded, text),
            label_map(want, 60, 100, segmenter.background_threshold),
        )


def test_threads_share_a_segmenter() -> None:
    image, text, _ = colour_scene()
    segmenter = small_segmenter(pamr=PAMR(2, (1, 2)), background_cleaning=True)
    before = dict(vars(segmenter))
    encoded = segmenter.encode(image)
    rows = [text, text[:2], text.flip(0)] * 4
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda row: segmenter.labels(encoded, row), rows))
    for labels, row in zip(got, rows, strict=True):
        assert torch.equal(labels, segmenter.labels(encoded, row))
    assert vars(segmenter) == before


MANY_CLASSES = """
import sys, torch
from pathlib import Path
from torch import nn
from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures
from talk2dino.segmentation.windows import sliding_windows

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def encoded(working, size):
    windows = sliding_windows(*working)
    tokens = torch.randn(len(windows), 1024, 64)
    image = torch.randint(0, 256, (3, *working), dtype=torch.uint8)
    maps = torch.randn(len(windows), 6, 1024)
    return EncodedImage(image, windows, WindowFeatures(tokens, maps, (32, 32)), size)

text = torch.nn.functional.normalize(torch.randn(171, 64), dim=-1)
pamr = PAMR(1) if sys.argv[1] == "pamr" else None
segmenter = Segmenter(nn.Identity(), pamr=pamr, background_cleaning=True)
small, large = encoded((64, 64), (64, 64)), encoded((448, 896), (1024, 2048))
segmenter.labels(small, text)
before = peak()
assert segmenter.labels(large, text).shape == (1024, 2048)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("refinement", ["none", "pamr"])
def test_171_classes_at_2048x1024_take_less_than_two_gigabytes(refinement: str) -> None:
    command = [sys.executable, "-c", MANY_CLASSES, refinement]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # One array of all classes at the size of the picture would already be 1.4 GB.
    assert int(done.stdout) < (0.4e9 if refinement == "none" else 1.2e9)


def test_synonyms_compete_for_their_class() -> None:
    image, text, _ = colour_scene()
    rows = torch.cat([text[1:2], text])  # green describes class 0 as well
    got = small_segmenter()(image, rows, row_classes=torch.tensor([0, 0, 1, 2])).labels
    plain = small_segmenter()(image, text).labels
    assert (got[plain < 2] == 0).all()  # equal scores: the first class wins
    assert (got == 2).any() and not (got == 1).any()


def test_merge_synonyms_is_a_maximum_in_any_order() -> None:
    scores = torch.rand(2, 4, 3, 3) - 2  # negative: the zeros of the target must not count
    merged = merge_synonyms(scores, torch.tensor([1, 0, 1, 0]))
    assert torch.equal(merged[:, 0], scores[:, [1, 3]].amax(1))
    assert torch.equal(merged[:, 1], scores[:, [0, 2]].amax(1))


@pytest.mark.parametrize("size", [(20, 500), (64, 64), (300, 40), (1, 1)])
def test_unusual_pictures(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    _, text, _ = colour_scene()
    labels = small_segmenter(long_side=200, pamr=PAMR(1, (1,)))(image, text).labels
    assert labels.shape == size


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        (lambda: small_segmenter(input_size=60), ConfigError, "input_size=60.*use 64"),
        (lambda: small_segmenter(window_batch_size=0), ConfigError, "window_batch_size=0"),
        (lambda: small_segmenter(stride=100), ConfigError, "stride=100"),
        (lambda: small_segmenter()(torch.rand(3, 9, 9), torch.eye(3)), DataError, "uint8"),
        (
            lambda: small_segmenter()(torch.zeros(9, 9, 3, dtype=torch.uint8), torch.eye(3)),
            DataError,
            r"\(9, 9, 3\)",
        ),
        (
            lambda: small_segmenter()(torch.zeros(3, 9, 9, dtype=torch.uint8), torch.eye(5)),
            DataError,
            "another vision encoder",
        ),
        (lambda: class_scores(torch.rand(1, 5, 3), torch.eye(3), (2, 2)), DataError, "2x2"),
        (lambda: merge_synonyms(torch.rand(1, 2, 3, 3), torch.tensor([0])), DataError, "1 row"),
        (
            lambda: merge_synonyms(torch.rand(1, 2, 3, 3), torch.tensor([0, 2])),
            DataError,
            "every class",
        ),
    ],
)
def test_bad_input(action: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        action()
