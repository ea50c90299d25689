"""The loss of words against a loop over words and images, and against InfoNCE."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from talk2dino.alignment.losses import InfoNCE
from talk2dino.alignment.module import AlignmentModule
from talk2dino.alignment.patch_mixture import patch_mixture
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.alignment.similarity import (
    Dense,
    DotProduct,
    MaxScore,
    Similarity,
    SoftHead,
    SumHeads,
)
from talk2dino.alignment.word_loss import WordLoss, WordOptions
from talk2dino.errors import ConfigError
from tests.helpers.ranks import two_ranks

TEXT, WIDTH, WORDS, IMAGES = 5, 6, 9, 12
ROWS = [3, 0, 7, 3, 5, 0, 11]  # images 3 and 0 have two captions in the batch
NONE = 11  # and this one has no word
SIMILARITIES: dict[str, Similarity] = {
    "dense": Dense(max_patches=4),
    "max_score": MaxScore(),
    "soft_head": SoftHead(),
    "pooled": DotProduct(),
    "sum": SumHeads(),
}


def words_of(row: int) -> set[int]:
    return set() if row == NONE else {row % WORDS, (row * 5 + 2) % WORDS, 4}


def of_image() -> Tensor:
    rows = [sorted(words_of(row)) for row in range(IMAGES)]
    return torch.tensor([row + [WORDS] * (3 - len(row)) for row in rows], dtype=torch.int32)


def embeddings() -> Tensor:
    return torch.randn(WORDS, TEXT, generator=torch.Generator().manual_seed(3))


def module_with(similarity: Similarity, digest: str = "", **options: Any) -> AlignmentModule:
    torch.manual_seed(1)
    return AlignmentModule(
        projection=ProjectionLayer(TEXT, WIDTH),
        similarity=similarity,
        loss=InfoNCE(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=None,
        val_similarity=DotProduct(),
        encoders={"vision": None, "text": None},
        words=WordLoss(embeddings(), of_image(), similarity, WordOptions(**options), digest=digest),
    ).double()


def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    unique, place = torch.tensor(ROWS).unique(return_inverse=True)
    shapes = {"disentangled_self_attn": (3, WIDTH), "patch_tokens": (8, WIDTH)}
    shapes["avg_self_attn_out"] = (WIDTH,)
    drawn = {
        name: torch.randn(len(unique), *shape, generator=random).double()
        for name, shape in shapes.items()
    }
    return {
        "embedding": torch.randn(len(ROWS), TEXT, generator=random).double(),
        "image_id": torch.tensor(ROWS) + 100,
        "image_row": torch.tensor(ROWS),
        "image_place": place,
        **drawn,
    }


def step_of(module: AlignmentModule) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a step and what it logs."""
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    torch.manual_seed(7)
    return module.training_step(batch(), 0), logged


def by_hand(module: AlignmentModule, chosen: Tensor) -> float:
    """The loss of all words, pair by pair, with what stands for the image of each caption."""
    words = module.words
    assert words is not None
    scale, threshold = words.options.logit_scale, words.options.near_synonym
    raw = embeddings().double()
    text = module.projection.project_text(raw).detach()
    columns = [ROWS.index(row) for row in dict.fromkeys(ROWS)]

    def score(word: int, column: int) -> float:
        one = words.similarity.scores(text[word][None], chosen[column][None])
        return scale * float(one)

    def counts(word: int, column: int) -> bool:
        own = words_of(ROWS[column])
        if word in own or threshold is None:
            return True
        return not any(
            float(torch.cosine_similarity(raw[word], raw[other], dim=0)) >= threshold
            for other in own
        )

    used = sorted(set().union(*(words_of(row) for row in ROWS)))
    by_word: list[float] = []
    by_image: list[float] = []
    for word in used:
        total = sum(math.exp(score(word, c)) for c in columns if counts(word, c))
        right = [c for c in columns if word in words_of(ROWS[c])]
        by_word.append(sum(math.log(total) - score(word, c) for c in right) / len(right))
    for column in columns:
        right = sorted(words_of(ROWS[column]))
        if right:
            total = sum(math.exp(score(w, column)) for w in used if counts(w, column))
            by_image.append(sum(math.log(total) - score(w, column) for w in right) / len(right))
    return (sum(by_word) / len(by_word) + sum(by_image) / len(by_image)) / 2


@pytest.mark.parametrize("near", [None, 0.5])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_step_equals_the_loop_over_words_and_images(name: str, near: float | None) -> None:
    module = module_with(SIMILARITIES[name], near_synonym=near, logit_scale=3.0)
    _, logged = step_of(module)
    torch.manual_seed(7)
    _, _, chosen = module._texts_and_images(batch())  # the same patches are drawn
    assert float(logged["train/word_loss"]) == pytest.approx(by_hand(module, chosen), rel=1e-9)


def test_near_synonyms_change_something() -> None:
    losses = [
        step_of(module_with(Dense(), near_synonym=near))[1]["train/word_loss"]
        for near in (None, 1.0, 0.5, 0.1)
    ]
    assert losses[0] == losses[1]  # a word alone equals itself
    assert losses[0] > losses[2] > losses[3]  # fewer wrong pairs to tell apart


def test_one_word_to_an_image_is_info_nce() -> None:
    count = 6
    words = WordLoss(
        torch.randn(count, TEXT),
        torch.arange(count)[:, None],
        DotProduct(),
        WordOptions(logit_scale=20.0),
    )
    rows = torch.tensor([4, 1, 5, 0, 2, 3])
    step = words.choose(rows, (0,))
    scores = torch.rand(count, count)  # [word, image of rows]
    square = scores[step.index.argsort()][rows]  # the word of image i in row i
    want = InfoNCE(logit_scale=20.0, normalize_by_batch_squared=False)(square)
    torch.testing.assert_close(words(scores, step), want)


def test_both_losses_are_weighed() -> None:
    captions = module_with(Dense())
    captions.words = None
    alone, logged = step_of(captions)
    assert logged.keys() == {"train/loss"}
    _, logged = step_of(module_with(Dense()))
    module = module_with(Dense(), weight=0.5, caption_weight=2.0)
    loss, both = step_of(module)
    torch.testing.assert_close(loss, 2 * alone + 0.5 * logged["train/word_loss"])
    assert both["train/loss"] is loss
    only, found = step_of(module_with(Dense(), caption_weight=0.0))
    torch.testing.assert_close(only, found["train/word_loss"])


def test_words_of_a_step_are_drawn_from_its_images() -> None:
    three = WordOptions(per_step=3)
    words = WordLoss(embeddings(), of_image(), DotProduct(), three, seed=1)
    rows = torch.tensor([3, 5, 3])
    allowed = words_of(3) | words_of(5)
    assert len(allowed) > 3
    drawn = [words.choose(rows, (step, 0)).index.tolist() for step in range(20)]
    assert set().union(*drawn) == allowed
    assert all(len(set(one)) == 3 for one in drawn)
    again = WordLoss(embeddings(), of_image(), DotProduct(), three, seed=1)
    torch.manual_seed(9)  # torch's own generator has no part in it
    assert [again.choose(rows, (step, 0)).index.tolist() for step in range(20)] == drawn
    again.seed = 2
    assert [again.choose(rows, (step, 0)).index.tolist() for step in range(20)] != drawn


def test_a_mixture_equals_the_loop_over_patches() -> None:
    """Of all images but the repeated ones, by the density of every word at every patch."""
    options: dict[str, Any] = {"per_step": 2, "mixture": 2.0, "mixture_patches": 4}
    options |= {"concentration": 4.0, "unexplained": 0.3}
    module = module_with(SIMILARITIES["dense"], **options)
    loss, logged = step_of(module)
    torch.manual_seed(7)
    _, _, chosen = module._texts_and_images(batch())
    text = module.projection.project_text(embeddings().double()).detach()
    cosines = torch.cosine_similarity(text[:, None, None], chosen[None], dim=-1)  # [V, B, P]
    densities = (4.0 * cosines).exp()
    densities /= densities.mean(dim=(1, 2), keepdim=True)
    losses = []
    for column in [ROWS.index(row) for row in dict.fromkeys(ROWS) if row != NONE]:
        own = sorted(words_of(ROWS[column]))
        ratios = 0.7 * densities[own, column].mean(0) + 0.3
        losses.append(-float(ratios.log().mean()))
    assert float(logged["train/mixture_loss"]) == pytest.approx(sum(losses) / len(losses))
    plain, _ = step_of(module_with(SIMILARITIES["dense"], per_step=2))
    assert float(loss - plain) == pytest.approx(2 * sum(losses) / len(losses))


def test_a_mixture_of_images_without_words_is_nothing() -> None:
    text = torch.randn(3, WIDTH, requires_grad=True)
    loss = patch_mixture(
        text, torch.randn(2, 4, WIDTH), torch.zeros(3, 2, dtype=torch.bool), 30.0, 0.1
    )
    loss.backward()
    assert float(loss) == 0
    assert text.grad is not None and not text.grad.any()


def test_images_without_words_leave_no_loss_and_no_nan() -> None:
    words = WordLoss(embeddings(), of_image(), DotProduct())
    scores = torch.rand(WORDS, 2, requires_grad=True)
    loss = words(scores, words.choose(torch.tensor([NONE, NONE]), (0,)))
    loss.backward()
    assert float(loss) == 0
    assert scores.grad is not None and scores.grad.tolist() == torch.zeros(WORDS, 2).tolist()


def test_words_are_no_part_of_a_checkpoint_and_move_with_the_module() -> None:
    module = module_with(Dense())
    assert not [name for name in module.state_dict() if "words" in name]
    assert not [name for name, _ in module.named_buffers() if "words" in name]
    words = module.words
    assert words is not None
    assert (words.embeddings.dtype, words.of_image.dtype) == (torch.float64, torch.int32)
    module.to("meta")
    assert {words.embeddings.device.type, words.of_image.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"weight": 0.0}, "words.weight is 0.0: it must be positive"),
        ({"caption_weight": -1.0}, "words.caption_weight=-1.0: use 0 or more"),
        ({"per_step": 1}, "words.per_step=1: .* use 2 or more"),
        ({"logit_scale": -3.0}, "words.logit_scale is -3.0"),
        ({"concentration": 0.0}, "words.concentration is 0.0: it must be positive"),
        ({"unexplained": 1.0}, "words.unexplained=1.0: use a share between 0 and 1"),
        ({"mixture": -1.0}, "words.mixture=-1.0: use 0 or more"),
        ({"mixture": 1.0}, "words.mixture=1.0: DotProduct compares no patches; use similarity=de"),
        ({"temperature": 0.0}, "words.temperature is 0.0: it must be positive"),
        ({"near_synonym": 1.5}, "words.near_synonym=1.5: a cosine above 0 and up to 1, or null"),
    ],
)
def test_values_out_of_range_are_one_line(option: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        module_with(DotProduct(), **option)


def disagreeing_rank(rank: int) -> None:
    dist.init_process_group("gloo")
    for digest, agreed in (("ab", True), (f"a{rank}", False)):
        module = module_with(DotProduct(), digest=digest)
        if agreed:
            module.on_fit_start()
        else:
            with pytest.raises(ConfigError, match="the ranks found different words"):
                module.on_fit_start()
    dist.destroy_process_group()


def test_ranks_must_have_found_the_same_words() -> None:
    two_ranks(disagreeing_rank)
