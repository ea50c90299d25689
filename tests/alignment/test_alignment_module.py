"""Training: two processes equal one, resuming equals going on, checkpoints hold plain values."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from talk2dino import load_projection
from talk2dino.alignment.inputs import stored_fields, visual_feature
from talk2dino.alignment.losses import InfoNCE, TripletLoss
from talk2dino.alignment.module import AlignmentModule, first_occurrences, gather_rows
from talk2dino.alignment.projection import DoubleMLP, Projection, ProjectionLayer
from talk2dino.alignment.retrieval import retrieval_metrics
from talk2dino.alignment.similarity import (
    Dense,
    DotProduct,
    MaxRowSum,
    MaxScore,
    Similarity,
    SoftHead,
    WeightedAverage,
)
from talk2dino.alignment.word_loss import WordLoss, WordOptions
from talk2dino.encoders.attention import pool_attention
from talk2dino.training.weight_averaging import AverageWeights
from tests.helpers.pipeline import TRAIN, fails, run
from tests.helpers.ranks import fork_what_lightning_spawns, two_ranks
from tests.helpers.stores import tiny_store

TEXT, WIDTH, HEADS, PATCHES, BATCH, TOKENS = 5, 7, 3, 11, 8, 4


class TokenProjection(ProjectionLayer):
    """ψ of every token."""

    text_fields = ("token_embeddings",)


def case(
    similarity: Similarity,
    loss: torch.nn.Module,
    kind: type[Projection] = ProjectionLayer,
    words: WordLoss | None = None,
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
        words=words,
    ).double()


def words(similarity: Similarity, mixture: float = 0.0) -> WordLoss:
    """Eight words, of which image i has i, i + 1 and 3; six of them a step."""
    embeddings = torch.randn(8, TEXT, generator=torch.Generator().manual_seed(2))
    of_image = torch.tensor([sorted({i % 8, (i + 1) % 8, 3}) for i in range(10) if i not in (2, 3)])
    of_image = torch.cat([of_image[:2], torch.tensor([[2, 3, 8]] * 2), of_image[2:]])
    options = WordOptions(per_step=6, near_synonym=0.6, mixture=mixture)
    return WordLoss(embeddings, of_image, similarity, options)


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
        "dense, words": case(Dense(), InfoNCE(), words=words(Dense(0.2))),
        "dense, mixture": case(Dense(), InfoNCE(), words=words(Dense(), mixture=2.0)),
        "max_score, words": case(MaxScore(), InfoNCE(), words=words(MaxScore())),
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
        "image_row": torch.tensor([2, 5, 7, 2, 9, 5, 4, 2]),
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


def ddp_rank(rank: int, folder: str, backend: str = "gloo") -> None:
    """One of two processes: its half of the batch through DDP."""
    warnings.simplefilter("error", FutureWarning)  # deprecated collectives
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    batch = {name: value[half].to(device) for name, value in whole_batch().items()}
    found = {}
    for name, module in cases().items():
        wrapped = DistributedDataParallel(LossOf(module).to(device))
        found[name] = {k: v.cpu() for k, v in loss_and_gradients(wrapped, batch).items()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    rows = gather_rows(torch.full((2, 3), rank, device=device))
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
    assert_whole_batch(name, ranks, 1e-12)


def assert_whole_batch(
    name: str, ranks: list[dict[str, dict[str, Tensor]]], tolerance: float
) -> None:
    want = loss_and_gradients(LossOf(cases()[name]), whole_batch())
    assert any("logit_scale" in key for key in want) == ("learnable" in name or "avg" in name)
    for rank in ranks:
        assert rank[name].keys() == want.keys()
        for key, value in want.items():
            deviation = float((rank[name][key] - value).abs().max())
            assert deviation <= tolerance, (key, deviation)
            assert float(value.abs().max()) > 1e-6, key  # not trivially equal


@pytest.mark.gpu
def test_two_processes_on_two_gpus(tmp_path: Path, gpu: torch.device) -> None:
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    two_ranks(ddp_rank, str(tmp_path), "nccl" if gpu.type == "cuda" else "gloo")
    files = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    ranks = [torch.load(file, weights_only=True) for file in files]
    for name in cases():
        assert_whole_batch(name, ranks, 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(cases()))
def test_a_step_on_gpu(name: str, gpu: torch.device) -> None:
    want = loss_and_gradients(LossOf(cases()[name]), whole_batch())
    batch = {key: value.to(gpu) for key, value in whole_batch().items()}
    got = loss_and_gradients(LossOf(cases()[name]).to(gpu), batch)
    for key, value in want.items():
        assert got[key].device.type == gpu.type
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(cases()))
def test_a_step_leaves_nothing_on_the_cpu(name: str) -> None:
    """Without a GPU: a device that mixes with no other and computes nothing."""
    batch = {key: value.to("meta") for key, value in whole_batch().items()}
    found = loss_and_gradients(LossOf(cases()[name]).to("meta"), batch)
    assert {value.device.type for value in found.values()} == {"meta"}


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
    return tiny_store(
        tmp_path_factory.mktemp("store"),
        {"patch_tokens": (9, WIDTH), "self_attn_maps": (HEADS, 9)},
        images=40,
        captions_per_image=2,
        text_dim=TEXT,
        learnable=True,
        images_per_shard=16,
        dtype="float32",
        vision={"name": "tiny", "weights_sha256": "aa", "spec": {"_target_": "vision"}},
        text={"name": "small", "weights_sha256": "bb", "spec": {"_target_": "text"}},
    )


def train(store: Path, folder: Path, *overrides: str, trainer: tuple[str, ...] = TRAIN) -> None:
    """The real entry point on the tiny store."""
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


def trained(
    store: Path, folder: Path, *overrides: str, trainer: tuple[str, ...] = TRAIN
) -> dict[str, Tensor]:
    """Weights that the real entry point leaves."""
    train(store, folder, *overrides, trainer=trainer)
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
        "retrieval.md",
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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", ["null", "1.0"])  # which decides about the fused optimizer
def test_precisions_on_gpu(
    store: Path, two_epochs: Path, tmp_path: Path, precision: str, clip: str, gpu: torch.device
) -> None:
    """The course of the losses is that of the CPU; validation and files go with it."""
    if precision == "16-mixed" and gpu.type == "cpu":
        pytest.skip("16-mixed is for GPUs")
    overrides = (f"trainer.precision={precision}", f"trainer.gradient_clip_val={clip}")
    here = "gpu" if gpu.type == "cuda" else "cpu"
    train(
        store,
        tmp_path,
        *overrides,
        trainer=(f"trainer={here}", "trainer.enable_progress_bar=false"),
    )
    got, want = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, two_epochs)
    )
    assert got["steps"] == want["steps"]
    # clipping changes little: a gradient of this loss is far below 1
    assert got["train/loss"] == pytest.approx(want["train/loss"], rel=0.05)
    recall = "val/text_to_image/recall@5"
    assert got["validation"][-1][recall] == pytest.approx(want["validation"][-1][recall], abs=15)


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


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_seed_gives_the_same_weights_twice(store: Path, two_epochs: Path, tmp_path: Path) -> None:
    first = load_projection(two_epochs / "projection.safetensors").state_dict()
    assert same(first, trained(store, tmp_path / "again"))
    assert not same(first, trained(store, tmp_path / "other", "seed=1"))


def test_a_stopped_run_goes_on_in_its_folder(
    store: Path, two_epochs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`resume=true`: nothing to resume from at first; then the curve is whole, no log is lost."""
    trained(store, tmp_path, "resume=true", "trainer.max_epochs=1")
    assert "last.ckpt is not there, so training begins" in capfd.readouterr().out
    weights = trained(store, tmp_path, "resume=true", "checkpoint.every_n_steps=3")
    assert same(load_projection(two_epochs / "projection.safetensors").state_dict(), weights)
    whole, parts = (
        json.loads((folder / "metrics.json").read_text()) for folder in (two_epochs, tmp_path)
    )
    assert [whole.pop("seconds") > 0, parts.pop("seconds") > 0] == [True, True]
    assert parts == whole
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["callbacks"]["LossCurve"]["steps"].tolist() == list(range(1, 9))
    assert (tmp_path / "logs" / "metrics.1.csv").is_file()
    assert (tmp_path / "logs" / "metrics.csv").is_file()


def test_the_best_is_kept_and_training_stops_early(store: Path, tmp_path: Path) -> None:
    """Training for the wrong figure soon stops to improve: the mean rank shall rise."""
    metric = "val/text_to_image/mean_rank"
    monitored = (f"checkpoint.monitor={metric}", f"early_stopping.monitor={metric}")
    weights = trained(
        store,
        tmp_path,
        *monitored,
        "early_stopping.patience=1",
        "trainer.max_epochs=20",
        "optimizer.lr=0.03",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ranks = [row[metric] for row in metrics["validation"]]
    assert len(ranks) < 20
    assert metrics["result"] == metrics["validation"][ranks.index(max(ranks))]
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert same(load_projection(folder / "best.ckpt").state_dict(), weights)
    assert not same(load_projection(folder / "last.ckpt").state_dict(), weights)
    table = (tmp_path / "retrieval.md").read_text()
    assert f"{max(ranks):.2f}" in table


def test_figures_of_the_lowest_loss_are_of_its_step(store: Path, tmp_path: Path) -> None:
    """The highest loss is that of the first epoch; the last validation is of other weights."""
    monitored = ("checkpoint.monitor=train/loss", "checkpoint.mode=max")
    trained(store, tmp_path, *monitored, "trainer.max_epochs=3")
    kept = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["result"]["step"] == kept["global_step"] < metrics["steps"]
    assert metrics["result"] == metrics["validation"][0]


class Weight(L.LightningModule):
    """One trained and one frozen number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(1.0))
        self.frozen = torch.nn.Parameter(torch.tensor(5.0), requires_grad=False)


def test_the_average_of_the_weights() -> None:
    """Against the formula by hand; accumulated batches and validation leave it as it is."""
    module, average, want = Weight(), AverageWeights(0.5), 1.0
    trainer: Any = SimpleNamespace(global_step=0)

    def end_of_batch() -> None:
        average.on_train_batch_end(trainer, module, None, None, 0)

    average.setup(trainer, module, "fit")
    average.on_fit_start(trainer, module)
    end_of_batch()  # no step yet
    for step, value in enumerate([2.0, 4.0, 8.0], start=1):
        module.value.data.fill_(value)
        trainer.global_step = step
        end_of_batch()
        end_of_batch()  # the second of two accumulated batches
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * value
    average.on_validation_epoch_start(trainer, module)
    assert module.value.item() == pytest.approx(want)
    average.on_validation_epoch_end(trainer, module)
    assert (module.value.item(), module.frozen.item()) == (8.0, 5.0)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    average.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["state_dict"]["value"].item() == pytest.approx(want)
    other, resumed = Weight(), AverageWeights(0.5)
    resumed.setup(trainer, other, "fit")
    resumed.on_load_checkpoint(trainer, other, checkpoint)
    assert other.value.item() == 8.0
    resumed.on_train_end(trainer, other)
    assert other.value.item() == pytest.approx(want)


def as_version_0_1(file: Path) -> None:
    """Rename what version 0.1 called otherwise; it wrote the same values."""
    content = torch.load(file, weights_only=True)
    content["raw_state_dict"] = content.pop("current_model_state")
    del content["averaging_state"]
    state = content["callbacks"]["AverageWeights"]
    content["callbacks"]["AverageWeights"] = {"steps": state["latest_update_step"]}
    torch.save(content, file)


@pytest.mark.parametrize("old", [False, True])
def test_a_run_with_an_average_goes_on_exactly(store: Path, tmp_path: Path, old: bool) -> None:
    whole = trained(store, tmp_path / "whole", "ema.decay=0.9")
    content = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    assert same(
        load_projection(tmp_path / "whole" / "checkpoints" / "last.ckpt").state_dict(), whole
    )
    raw = content["current_model_state"]
    assert not same(whole, {name.removeprefix("projection."): v for name, v in raw.items()})
    half = trained(store, tmp_path / "half", "ema.decay=0.9", "trainer.max_epochs=1")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    if old:
        as_version_0_1(last)
        assert same(load_projection(last).state_dict(), half)
    resumed = trained(store, tmp_path / "half", "ema.decay=0.9", "resume=true")
    assert same(whole, resumed)


def test_an_average_begins_with_the_weights_of_a_run_without_one(
    store: Path, tmp_path: Path
) -> None:
    """From a frozen optimizer on, the average of those weights is those weights."""
    plain = trained(store, tmp_path, "trainer.max_epochs=1", "optimizer.lr=0.0")
    averaged = trained(store, tmp_path, "ema.decay=0.9", "resume=true", "optimizer.lr=0.0")
    assert same(plain, averaged)


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_ddp_through_the_entry_point(
    store: Path, two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with half the batch are the run of one process, and write one set of files."""
    fork_what_lightning_spawns(monkeypatch)
    ddp = ("trainer=ddp_cpu", "trainer.enable_progress_bar=false")
    weights = trained(store, tmp_path, "data.batch_size=8", trainer=ddp)
    want = load_projection(two_epochs / "projection.safetensors").state_dict()
    for name, value in want.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert files_of(tmp_path) == files_of(two_epochs)


UNEVEN = (  # 60 captions: batches of 16 leave 12 over, in which no rank may wait for the other
    "data.val_fraction=0.25",
    "trainer.accumulate_grad_batches=2",
    "loss.mask_same_image=true",
    "trainer.max_epochs=1",
)


def torchrun_rank(rank: int, store: Path, folder: Path) -> None:
    ddp = ("trainer=ddp_cpu", "trainer.strategy=ddp", "trainer.enable_progress_bar=false")
    train(store, folder, "data.batch_size=8", *UNEVEN, trainer=ddp)


def test_ranks_started_by_torchrun_with_an_uneven_end(store: Path, tmp_path: Path) -> None:
    """As one process, with accumulated gradients and masked captions of the same image."""
    two_ranks(torchrun_rank, store, tmp_path / "ranks")
    weights = load_projection(tmp_path / "ranks" / "projection.safetensors").state_dict()
    want = trained(store, tmp_path / "one", *UNEVEN)
    for name, value in want.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert files_of(tmp_path / "ranks") == files_of(tmp_path / "one")


def test_only_chosen_heads_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is chosen before the gather: patch tokens and heads stay on their rank."""
    travelled: list[tuple[int, ...]] = []

    def gather(rows: Tensor) -> Tensor:
        travelled.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr("talk2dino.alignment.module.gather_rows", gather)
    for similarity in (MaxScore(), Dense()):
        case(similarity, InfoNCE()).scores(whole_batch())
    assert travelled == [(BATCH, WIDTH), (BATCH, BATCH), (BATCH,)] * 2


def test_errors_of_ranks_are_one_line(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(
        capfd,
        "train",
        "experiment=vits_infonce",
        "projection.text_dim=null",
        "projection.vision_dim=384",
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


def test_steps_that_teach_nothing_are_counted() -> None:
    module = case(DotProduct(), InfoNCE(mask_same_image=True))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = {
        "embedding": torch.rand(3, TEXT).double(),
        "avg_self_attn_out": torch.rand(3, WIDTH).double(),
    }
    for ids in ([4, 4, 4], [4, 4, 5], [6, 6, 6]):
        loss = module.training_step(batch | {"image_id": torch.tensor(ids)}, 0)
        assert (loss == 0) == (len(set(ids)) == 1)
    with pytest.warns(UserWarning, match="2 of 3 steps had captions of one image only"):
        module.on_train_epoch_end()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.training_step(batch | {"image_id": torch.tensor([1, 2, 2])}, 0)
        module.on_train_epoch_end()


def test_validation_keeps_an_image_once() -> None:
    """However many captions it has, and in whatever batches they come."""
    module, seen = case(DotProduct(), InfoNCE()), []
    module.log_dict = lambda metrics, **_: seen.append(metrics)  # type: ignore[method-assign]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    ids = torch.tensor([3, 3, 1, 3, 9, 1, 9, 9])
    images, texts = torch.rand(10, WIDTH).double(), torch.rand(len(ids), TEXT).double()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        batch = {"embedding": texts[rows], "avg_self_attn_out": images[ids[rows]]}
        module.validation_step(batch | {"image_id": ids[rows]}, 0)
    kept = torch.cat([batch["visual"] for batch in module._val_batches])
    assert kept.shape == (3, WIDTH)
    module.on_validation_epoch_end()
    unique = torch.tensor([9, 1, 3])
    want = retrieval_metrics(
        DotProduct().scores, module.projection.project_text(texts), images[unique], ids, unique
    )
    assert {k.removeprefix("val/"): v for k, v in seen[0].items()} == pytest.approx(want)
