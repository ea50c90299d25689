"""Background cleaning against the original's arrays, and at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation import clean_background
from tests.helpers.goldens import Golden
from tests.helpers.parity import ParityRecord


@pytest.mark.parametrize("case", ["n3", "n21", "n1", "rect", "lambda05"])
def test_original(case: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("masker_bgclean")
    read = {key.rsplit("/", 1)[1]: a for key, a in arrays.items() if f"bgclean/{case}/" in key}
    parity.check(
        part="background cleaning",
        original="DINOText.similarity_assignment_weighted",
        got=clean_background(
            read["mask"],
            read["image_feat"].flatten(2).transpose(1, 2),
            read["self_attn_maps"],
            read["text_emb"],
            float(read["lambda_bg"]),
        ),
        want=read["out"],
        tolerance=2e-6,
    )


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    text = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    scales = torch.arange(1.0, batch + 1)  # images of different ranges
    maps = torch.randn(batch, 3, 30) * 4 * scales[:, None, None]
    mask = torch.rand(batch, 4, 5, 6) / scales[:, None, None, None]
    return mask, torch.randn(batch, 30, 16), maps, text


def test_an_image_does_not_see_its_batch() -> None:
    mask, tokens, maps, text = inputs(3)
    together = clean_background(mask, tokens, maps, text)
    for i in range(3):
        alone = clean_background(mask[i : i + 1], tokens[i : i + 1], maps[i : i + 1], text)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_definition_written_out_for_one_pixel() -> None:
    mask, tokens, maps, text = (part.double() for part in inputs(1))
    heads = [sum(maps[0, h, p] * tokens[0, p] for p in range(30)) / 30 for h in range(3)]
    heads = [head / head.norm() for head in heads]
    rows = []
    for k in range(4):
        weight = torch.stack([text[k] @ head for head in heads]).softmax(0)
        rows.append(sum(weight[h] * maps[0, h] for h in range(3)).softmax(0))
    attention = torch.stack(rows)
    scaled = (attention - attention.min()) / attention.max()
    scaled = scaled * (mask.max() - mask.min()) + mask.min()
    want = (mask[0, 2, 4, 5] + 0.2 * scaled[2, 29]) / 1.2
    got = clean_background(mask, tokens, maps, text)[0, 2, 4, 5]
    assert float(got) == pytest.approx(float(want), abs=1e-6)


def test_no_weight_no_change_and_nothing_written_over() -> None:
    mask, tokens, maps, text = inputs(2)
    kept = [part.clone() for part in (mask, tokens, maps, text)]
    torch.testing.assert_close(clean_background(mask, tokens, maps, text, 0.0), mask)
    clean_background(mask, tokens, maps, text)
    for part, before in zip((mask, tokens, maps, text), kept, strict=True):
        assert torch.equal(part, before)


def test_zero_attention_gives_finite_scores() -> None:
    mask, tokens, maps, text = inputs(1)
    assert clean_background(mask, tokens, maps * 0, text).isfinite().all()


@pytest.mark.parametrize(
    ("broken", "said"),
    [(0, "mask"), (1, "patch_tokens"), (2, "self_attn_maps"), (3, "text")],
)
def test_shapes_that_do_not_fit_are_named(broken: int, said: str) -> None:
    parts = list(inputs(2))
    cut = {0: parts[0][0], 1: parts[1][:, :-1], 2: parts[2][..., :-1], 3: parts[3][:, :-1]}
    parts[broken] = cut[broken]
    with pytest.raises(DataError, match=said):
        clean_background(*parts)
