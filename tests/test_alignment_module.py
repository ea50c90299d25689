"""Training: two processes equal one, resuming equals going on, checkpoints hold plain values."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from talk2dino import load_projection
from talk2dino.alignment.losses import InfoNCE, TripletLoss
from talk2dino.alignment.module import AlignmentModule, first_occurrences, gather_rows
from talk2dino.alignment.pooling import stored_fields, visual_feature
from talk2dino.alignment.projection import DoubleMLP, Projection, ProjectionLayer
from talk2dino.alignment.similarity import (
    Dense,
    DotProduct,
    MaxRowSum,
    MaxScore,
    Similarity,
    SoftHead,
    WeightedAverage,
)
from talk2dino.encoders.attention import pool_attention
from talk2dino.features import write_store
from tests.pipeline import TRAIN, fails, run
from tests.ranks import two_ranks

TEXT, WIDTH, HEADS, PATCHES, BATCH, TOKENS = 5, 7, 3, 11, 8, 4


class TokenProjection(ProjectionLayer):
    """ψ of every token."""

    text_fields = ("token_embeddings",)


def case(
    similarity: Similarity,
    loss: torch.nn.Module,
    kind: type[Projection] = ProjectionLayer,
) -> AlignmentModule:
    torch.manual_seed(1)
    return AlignmentModule(
        projection=kind(TEXT, WIDTH),  # type: ignore[call-arg]
        similarity=similarity,
        loss=loss,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        scheduler=None,
        val_similarity=DotProduct(),
        encoders={"vision": None, "text": None},
    ).double()


def cases() -> dict[str, AlignmentModule]:
    """Fresh modules for every similarity and loss that the ranks must agree on."""
    return {
        "max_score": case(MaxScore(), InfoNCE()),
        "max_score, masked, learnable": case(
            MaxScore(), InfoNCE(learnable_logit_scale=True, mask_same_image=True)
        ),
        "dense": case(Dense(), InfoNCE(normalize_by_batch_squared=False)),
        "dense, masked, learnable": case(
            Dense(chunk_size=2),
            InfoNCE(
                normalize_by_batch_squared=False, mask_same_image=True, learnable_logit_scale=True
            ),
        ),
        "weighted_avg": case(WeightedAverage(), InfoNCE(learnable_logit_scale=True)),
        "soft_head, triplet": case(SoftHead(), TripletLoss()),
        "visual projection": case(MaxScore(), InfoNCE(), DoubleMLP),
        "tokens": case(MaxRowSum(), InfoNCE(), TokenProjection),
    }


def whole_batch() -> dict[str, Tensor]:
    """Both ranks' pairs; images 2 and 5 have captions on both ranks."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=random, dtype=torch.float64)

    lengths = torch.randint(3, TOKENS + 1, (BATCH,), generator=random)
    return {
        "embedding": normal(TEXT),
        "token_embeddings": normal(TOKENS, TEXT),
        "token_mask": torch.arange(TOKENS) < lengths[:, None],
        "disentangled_self_attn": normal(HEADS, WIDTH),
        "patch_tokens": normal(PATCHES, WIDTH),
        "image_id": torch.tensor([2, 5, 7, 2, 9, 5, 4, 2]),
    }


class LossOf(torch.nn.Module):
    """`training_step` as a forward pass, for DDP to wrap."""

    def __init__(self, module: AlignmentModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")  # no trainer here
            return self.module.training_step(batch, 0)


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model(batch)
    loss.backward()
    gradients = {
        name.split("module.")[-1]: parameter.grad for name, parameter in model.named_parameters()
    }
    return {"loss": loss.detach(), **gradients}


def ddp_rank(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch through DDP."""
    warnings.simplefilter("error", FutureWarning)  # deprecated collectives
    dist.init_process_group("gloo")
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    batch = {name: value[half] for name, value in whole_batch().items()}
    found = {
        name: loss_and_gradients(DistributedDataParallel(LossOf(module)), batch)
        for name, module in cases().items()
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    rows = gather_rows(torch.full((2, 3), rank))
    assert rows[:, 0].tolist() == [0, 0, 1, 1]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(ddp_rank, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_equal_one_with_the_whole_batch(
    name: str, ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    want = loss_and_gradients(LossOf(cases()[name]), whole_batch())
    assert any("logit_scale" in key for key in want) == ("learnable" in name or "avg" in name)
    for rank in ranks:
        assert rank[name].keys() == want.keys()
        for key, value in want.items():
            deviation = float((rank[name][key] - value).abs().max())
            assert deviation <= 1e-12, (key, deviation)
            assert float(value.abs().max()) > 1e-6, key  # not trivially equal


def test_scores_are_those_of_the_similarity() -> None:
    batch = whole_batch()
    module = case(MaxScore(), InfoNCE())
    scores, image_ids = module.scores(batch)
    text = module.projection.project_text(batch["embedding"])
    torch.testing.assert_close(scores, MaxScore()(text, batch["disentangled_self_attn"]))
    assert image_ids is batch["image_id"]


def test_a_token_mask_goes_with_token_text_only() -> None:
    batch = whole_batch()
    module = case(MaxScore(), InfoNCE())
    module.scores(batch)  # the batch carries a mask that one-vector text has no use for
    tokens = case(MaxRowSum(), InfoNCE(), TokenProjection)
    masked, _ = tokens.scores(batch)
    everything, _ = tokens.scores(batch | {"token_mask": torch.ones(BATCH, TOKENS).bool()})
    assert not torch.allclose(masked, everything)


def test_dense_features_are_pooled_on_the_way() -> None:
    stored = ("patch_tokens", "self_attn_maps", "cls_token")
    assert stored_fields("patch_tokens", stored) == ("patch_tokens",)
    assert stored_fields("disentangled_self_attn", stored) == ("patch_tokens", "self_attn_maps")
    both = (*stored, "disentangled_self_attn")
    assert stored_fields("disentangled_self_attn", both) == ("disentangled_self_attn",)
    assert stored_fields("avg_self_attn_out", ("cls_token",)) == ("avg_self_attn_out",)
    tokens, maps = torch.randn(2, 5, 3), torch.randn(2, 4, 5)
    batch = {"patch_tokens": tokens, "self_attn_maps": maps}
    per_head = pool_attention(tokens, maps)
    torch.testing.assert_close(visual_feature(batch, "disentangled_self_attn"), per_head)
    averaged = pool_attention(tokens, maps, head_average=True)
    torch.testing.assert_close(visual_feature(batch, "avg_self_attn_out"), averaged)
    assert visual_feature(batch, "patch_tokens") is tokens


def test_first_occurrences() -> None:
    values, first = first_occurrences(torch.tensor([5, 2, 5, 9, 2]))
    assert values.tolist() == [2, 5, 9]
    assert first.tolist() == [1, 0, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of two captions that a projection can learn to tell apart."""
    random = np.random.default_rng(0)
    patches = random.normal(size=(40, 9, WIDTH))
    folder = tmp_path_factory.mktemp("store")
    write_store(
        folder,
        {
            "patch_tokens": patches,
            "self_attn_maps": random.normal(size=(40, HEADS, 9)),
        },
        {
            "image_row": np.repeat(np.arange(40), 2),
            "embedding": patches.mean(1).repeat(2, 0)[:, :TEXT]
            + 0.01 * random.normal(size=(80, TEXT)),
        },
        images_per_shard=16,
        dtype="float32",
        vision={"name": "tiny", "weights_sha256": "aa", "spec": {"_target_": "vision"}},
        text={"name": "small", "weights_sha256": "bb", "spec": {"_target_": "text"}},
    )
    return folder


def trained(
    store: Path, folder: Path, *overrides: str, trainer: tuple[str, ...] = TRAIN
) -> dict[str, Tensor]:
    """Weights after the real entry point has trained on the tiny store."""
    run(
        "train",
        "experiment=vits_infonce",
        f"projection.text_dim={TEXT}",
        f"projection.vision_dim={WIDTH}",
        f"store={store}",
        "data.val_fraction=0.2",
        "data.batch_size=16",
        "trainer.max_epochs=2",
        "optimizer.lr=0.01",
        f"hydra.run.dir={folder}",
        *trainer,
        *overrides,
    )
    return dict(load_projection(folder / "projection.safetensors").state_dict())


@pytest.fixture(scope="module")
def two_epochs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    trained(store, folder)
    return folder


def test_a_run_leaves_these_files(two_epochs: Path) -> None:
    names = {str(path.relative_to(two_epochs)) for path in two_epochs.rglob("*") if path.is_file()}
    assert {
        "checkpoints/last.ckpt",
        "projection.safetensors",
        "config.yaml",
        "metrics.json",
        "loss.png",
        "logs/metrics.csv",
    } <= names
    assert not [name for name in names if name.endswith(".tmp")]
    metrics = json.loads((two_epochs / "metrics.json").read_text())
    assert metrics["steps"] == 8  # 64 captions in batches of 16, twice
    assert len(metrics["validation"]) == 2
    assert set(metrics["validation"][0]) >= {"step", "val/text_to_image/recall@1"}


def test_a_checkpoint_holds_plain_values(two_epochs: Path) -> None:
    file = two_epochs / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    assert content["talk2dino"]["vision"] == {"_target_": "vision"}
    assert content["talk2dino"]["text"] == {"_target_": "text"}
    one = load_projection(file).state_dict()
    other = load_projection(two_epochs / "projection.safetensors").state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_resuming_equals_going_on(store: Path, two_epochs: Path, tmp_path: Path) -> None:
    """Holds exactly: the epoch decides the order, and the optimiser's state is kept."""
    half = trained(store, tmp_path / "half", "trainer.max_epochs=1")
    resumed = trained(
        store, tmp_path / "resumed", f"ckpt_path={tmp_path}/half/checkpoints/last.ckpt"
    )
    want = load_projection(two_epochs / "projection.safetensors").state_dict()
    for name, value in want.items():
        assert not torch.equal(half[name], value)
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    metrics = json.loads((tmp_path / "resumed" / "metrics.json").read_text())
    assert metrics["steps"] == 8


def test_ddp_through_the_entry_point(store: Path, two_epochs: Path, tmp_path: Path) -> None:
    """Two ranks with half the batch are the run of one process, and write one set of files."""
    ddp = ("trainer=ddp_cpu", "trainer.enable_progress_bar=false")
    weights = trained(store, tmp_path, "data.batch_size=8", trainer=ddp)
    want = load_projection(two_epochs / "projection.safetensors").state_dict()
    for name, value in want.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    here, there = (
        {p.relative_to(f) for f in (folder,) for p in f.rglob("*") if p.is_file()}
        for folder in (tmp_path, two_epochs)
    )
    assert here == there


def test_errors_of_ranks_are_one_line(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(
        capfd,
        "train",
        "experiment=vits_infonce",
        "projection.text_dim=null",
        f"store={store}",
        f"hydra.run.dir={tmp_path}",
        *TRAIN,
    )
    assert "projection.vision_dim=384 but" in line
    assert f"width {WIDTH} (tiny); set projection.vision_dim={WIDTH}" in line


def test_losses_fall(store: Path, tmp_path: Path) -> None:
    trained(store, tmp_path, "trainer.max_epochs=12", "loss.normalize_by_batch_squared=false")
    rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < 0.8 * losses[0]


def test_modules_copy() -> None:
    """EMA and search tools copy modules."""
    module = case(Dense(), InfoNCE())
    assert copy.deepcopy(module).description() == module.description()


def test_without_scheduler_and_with_frozen_projection_parts() -> None:
    module = case(MaxScore(), InfoNCE(learnable_logit_scale=True))
    optimizer: Any = module.configure_optimizers()
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(module.projection.parameters())) + 1
