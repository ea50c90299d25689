"""A training that was stopped anywhere and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from talk2dino.alignment.losses import InfoNCE
from talk2dino.alignment.module import AlignmentModule
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.alignment.schedules import cosine_with_warmup
from talk2dino.alignment.similarity import Dense, DotProduct
from talk2dino.alignment.word_loss import WordLoss, WordOptions
from talk2dino.features import FeatureDataModule
from talk2dino.training.results import SaveMetrics
from talk2dino.training.resume import (
    SETTINGS,
    AtomicCheckpointIO,
    LastCheckpoint,
    SeedSteps,
    keep_logs,
)
from talk2dino.training.weight_averaging import AverageWeights
from tests.helpers.pipeline import TRAIN, fails, run
from tests.helpers.ranks import two_ranks
from tests.helpers.stores import tiny_store

IMAGES, BATCH, EPOCHS = 14, 4, 2  # two images held out: six steps per epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("resume") / "store")


def make_store(folder: Path) -> Path:
    fields = {"patch_tokens": (6, 8), "avg_self_attn_out": (8,)}
    return tiny_store(
        folder, fields, images=IMAGES, captions_per_image=2, text_dim=5, images_per_shard=7
    )


class Record(L.Callback):
    """What the trainer really trains on, and where it validates."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.rates: list[float] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        place = (trainer.current_epoch, index, trainer.global_step)
        self.batches.append((*place, *batch["caption_row"].tolist()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


class Copies(LastCheckpoint):
    """Keeps every checkpoint that would be overwritten."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        save, count = trainer.save_checkpoint, [0]

        def numbered(path: Path, weights_only: bool | None = None) -> None:
            save(path.with_name(f"{count[0]:03d}.ckpt"))
            count[0] += 1

        trainer.save_checkpoint = numbered  # type: ignore[method-assign,assignment]


def some_words() -> WordLoss:
    """Six words, two of each image; three of them a step."""
    of_image = torch.arange(2 * IMAGES).view(IMAGES, 2) % 6
    return WordLoss(torch.randn(6, 5), of_image, Dense(), WordOptions(per_step=3), seed=3)


def parts(
    store: Path, words: bool = False, **data: Any
) -> tuple[AlignmentModule, FeatureDataModule]:
    torch.manual_seed(0)
    module = AlignmentModule(
        projection=ProjectionLayer(text_dim=5, vision_dim=8),
        similarity=Dense(max_patches=3),
        loss=InfoNCE(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        scheduler=partial(cosine_with_warmup, warmup_steps=3),
        val_similarity=DotProduct(),
        encoders={"vision": None, "text": None},
        words=some_words() if words else None,
    )
    options = {"batch_size": BATCH, "val_fraction": 2 / IMAGES, "seed": 3, **data}
    return module, FeatureDataModule(store, ("patch_tokens",), **options)


def fit(
    store: Path,
    folder: Path,
    checkpoint: Path | None = None,
    keep: bool = False,
    data: dict[str, Any] | None = None,
    ema: bool = False,
    words: bool = False,
    **trainer: Any,
) -> tuple[AlignmentModule, Record, SaveMetrics]:
    module, source = parts(store, words, **(data or {}))
    record, curve = Record(), SaveMetrics(folder)
    last = (Copies if keep else LastCheckpoint)(folder / "last.ckpt", every_n_steps=1)
    callbacks = [SeedSteps(3), *([AverageWeights(0.9)] if ema else []), record, curve, last]
    patience = EarlyStopping("val/text_to_image/mean_rank", patience=1)
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1} | trainer
    L.Trainer(
        callbacks=[*callbacks, *([patience] if options.pop("stop_early", False) else [])],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    ).fit(module, source, ckpt_path=checkpoint)
    return module, record, curve


def assert_same_weights(module: AlignmentModule, want: AlignmentModule, note: str) -> None:
    for name, value in want.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), f"{note}: {name}"


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and ema": {"accumulate_grad_batches": 2, "ema": True},
    "words": {"accumulate_grad_batches": 2, "words": True},
    "validation within the epoch": {"val_check_interval": 0.5, "accumulate_grad_batches": 2},
    "early stopping": {"stop_early": True, "max_epochs": 3},
    "steps": {"max_epochs": -1, "max_steps": 9},
    "block shuffle, one caption per image, no prefetch": {
        "data": {
            "captions": "one_per_image",
            "shuffle": "block",
            "block_rows": 2,
            "mix_blocks": 2,
            "prefetch": 0,
        }
    },
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("case", CASES)
def test_resumed_at_every_step(store: Path, tmp_path: Path, case: str) -> None:
    """Stopped after any optimizer step and resumed from there: same batches, same weights."""
    options = CASES[case]
    want, record, curve = fit(store, tmp_path, keep=True, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 6
    for checkpoint in checkpoints:
        done = torch.load(checkpoint, weights_only=True)["global_step"]
        module, rest, resumed = fit(store, tmp_path / "again", checkpoint, **options)
        assert_same_weights(module, want, f"{case}, {checkpoint.name}, step {done}")
        later = len(rest.batches)
        assert rest.batches == record.batches[len(record.batches) - later :], checkpoint.name
        assert rest.rates == record.rates[len(record.rates) - later :]
        assert later == sum(batch[2] >= done for batch in record.batches)
        skipped = len(record.validated) - len(rest.validated)
        assert rest.validated == record.validated[skipped:], checkpoint.name
        assert all(step <= done for step in record.validated[:skipped]), checkpoint.name
        assert [step for step, _ in resumed.train] == [step for step, _ in curve.train]
        assert [float(x) for _, x in resumed.train] == [float(x) for _, x in curve.train]
        assert resumed.validation == curve.validation


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resumed_on_gpu(store: Path, tmp_path: Path, precision: str, gpu: torch.device) -> None:
    """Patches drawn on the device, batches read ahead by a thread, a scale of the gradients."""
    if precision == "16-mixed" and gpu.type == "cpu":
        pytest.skip("16-mixed is for GPUs")
    here = "gpu" if gpu.type == "cuda" else "cpu"
    options: dict[str, Any] = {"accelerator": here, "precision": precision, "ema": True}
    want, record, _ = fit(store, tmp_path, keep=True, **options)
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[1::4]:
        module, rest, _ = fit(store, tmp_path / "again", checkpoint, **options)
        assert_same_weights(module, want, f"{precision}, {checkpoint.name}")
        assert rest.batches == record.batches[len(record.batches) - len(rest.batches) :]


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(
    store: Path, tmp_path: Path
) -> None:
    one, first, _ = fit(store, tmp_path)
    two, second, _ = fit(store, tmp_path)
    assert_same_weights(two, one, "again")
    assert first.batches == second.batches
    _, other, _ = fit(store, tmp_path, data={"seed": 4})
    assert [row[3:] for row in other.batches] != [row[3:] for row in first.batches]


def test_random_numbers_of_a_step_do_not_depend_on_the_past(store: Path, tmp_path: Path) -> None:
    """A validation that draws numbers changes no later step."""
    want, _, _ = fit(store, tmp_path, num_sanity_val_steps=0)

    class Draws(L.Callback):
        def on_validation_end(self, *_: Any) -> None:
            torch.rand(7)

    module, source = parts(store)
    L.Trainer(
        callbacks=[SeedSteps(3), Draws()],
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, source)
    assert_same_weights(module, want, "draws")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_resumed_with_workers(store: Path, tmp_path: Path) -> None:
    """Workers have read ahead by then; another number of them changes nothing."""
    want, record, _ = fit(store, tmp_path / "plain")
    fit(store, tmp_path, keep=True, data={"num_workers": 2, "prefetch": 3})
    checkpoint = sorted(tmp_path.glob("*.ckpt"))[8]
    for workers in (0, 2):
        module, rest, _ = fit(store, tmp_path / "x", checkpoint, data={"num_workers": workers})
        assert_same_weights(module, want, f"{workers} workers")
        assert rest.batches == record.batches[len(record.batches) - len(rest.batches) :]


def test_another_order_is_refused(store: Path, tmp_path: Path) -> None:
    from talk2dino.errors import ConfigError

    fit(store, tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match="checkpoint was trained with shuffle='global', now shuf"):
        fit(store, tmp_path, tmp_path / "last.ckpt", data={"shuffle": "block"})


def test_checkpoint_is_whole_or_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying in the middle of writing leaves the checkpoint before."""
    path = tmp_path / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)
    save = torch.save

    def dies(content: Any, target: BinaryIO) -> None:
        save(content, target)
        target.truncate(100)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(2)}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def ranks_fit(rank: int, folder: Path) -> None:
    """Two ranks: whole, then from the middle of the second epoch."""
    options = {"devices": 2, "strategy": "ddp", "data": {"batch_size": 2}}
    want, record, _ = fit(folder / "store", folder / "whole", keep=True, **options)
    checkpoint = sorted((folder / "whole").glob("*.ckpt"))[8]
    module, rest, _ = fit(folder / "store", folder / "again", checkpoint, **options)
    assert_same_weights(module, want, "two ranks")
    assert 0 < len(rest.batches) < len(record.batches)
    assert rest.batches == record.batches[len(record.batches) - len(rest.batches) :]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    two_ranks(ranks_fit, tmp_path)


SMALL = (
    "experiment=vits_infonce",
    "similarity=pooled",
    "projection.text_dim=5",
    "projection.vision_dim=8",
    "data.batch_size=4",
    "data.val_fraction=0.2",
    "resume=true",
    *TRAIN,
)


def files_of_run(folder: Path) -> list[Path]:
    """All but what Hydra notes of every start."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if ".hydra" not in path.parts and path.suffix != ".log"]


def test_what_the_best_weights_are_chosen_by_is_compared(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Recalls of two stores do not compete; where nothing is chosen, another store is welcome."""
    other = tmp_path / "other"
    shutil.copytree(store, other)
    fields = {"patch_tokens": (6, 8), "avg_self_attn_out": (8,)}
    third = tiny_store(tmp_path / "third", fields, images=6, text_dim=5, seed=3)
    for chosen in (True, False):
        begun = (*SMALL, f"store={store}", f"hydra.run.dir={tmp_path / str(chosen)}", "resume=true")
        metric = "val/text_to_image/recall@1" if chosen else "null"
        begun += (f"checkpoint.monitor={metric}",)
        run("train", *begun, "trainer.max_epochs=1", f"val_store={other}")
        run("train", *begun, "trainer.max_epochs=2", f"val_store={store}")  # the same shards
        more = (*begun, "trainer.max_epochs=3", f"val_store={third}")
        if chosen:
            line = fails(capfd, "train", *more)
            assert "this run was begun with val_store.shards_sha256=" in line
            line = fails(capfd, "train", *more[:-1], f"val_store={other}", "val_similarity=dense")
            assert "this run was begun with val_similarity" in line
        else:
            run("train", *more)


def test_logs_are_kept_beside_a_gap(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("metrics.csv", "metrics.2.csv"):
        (logs / name).write_text(name)
    for written in (["metrics.1.csv", "metrics.2.csv"], ["metrics.1.csv", "metrics.2.csv"]):
        keep_logs(tmp_path)
        assert sorted(path.name for path in logs.iterdir()) == written
    assert (logs / "metrics.2.csv").read_text() == "metrics.2.csv"


def test_another_run_is_refused_by_its_first_setting(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever decides the weights; a longer run, another place and the same store go on."""
    folder = tmp_path / "run"

    def options(*more: str, of: Path = store) -> tuple[str, ...]:
        return (*SMALL, f"store={of}", f"hydra.run.dir={folder}", "trainer.max_epochs=1", *more)

    run("train", *options())
    config = (folder / "config.yaml").read_bytes()
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    run("train", *options("trainer.max_epochs=2", of=moved))
    kept = {path: path.read_bytes() for path in files_of_run(folder)}
    for change, message in {
        "optimizer.lr=0.5": "optimizer.lr=0.0001, now optimizer.lr=0.5",
        "optimizer=adamw": "optimizer._target_=",
        "loss.mask_same_image=true": "loss.mask_same_image=False, now",
        "seed=7": "seed=",
        "scheduler=cosine": "scheduler",
        "projection.activation=relu": "projection.activation='tanh', now",
        "trainer.gradient_clip_val=1.0": "trainer.gradient_clip_val=None, now",
        "data.val_fraction=0.3": "data.val_fraction=0.2, now data.val_fraction=0.3",
    }.items():
        line = fails(capfd, "train", *options(change))
        assert f"this run was begun with {message}" in line
        assert "hydra.run.dir=DIR" in line
    other = tiny_store(
        tmp_path / "other",
        {"patch_tokens": (6, 8), "avg_self_attn_out": (8,)},
        images=IMAGES,
        captions_per_image=2,
        text_dim=5,
        images_per_shard=7,
        seed=1,
    )
    line = fails(capfd, "train", *options(of=other))
    assert "this run was begun with store.shards_sha256=" in line
    assert kept == {path: path.read_bytes() for path in kept}
    assert config != (folder / "config.yaml").read_bytes()  # of the longer run


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off", None])
def test_what_is_no_checkpoint_is_refused_in_one_line(
    content: bytes | None, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    if content is None:
        torch.save({"weights": torch.zeros(3)}, file)
    else:
        file.write_bytes(content)
    line = fails(capfd, "train", *SMALL, f"store={store}", f"hydra.run.dir={file.parents[1]}")
    assert f"{file}: no checkpoint of a training that can be loaded" in line


def test_a_checkpoint_without_settings_is_compared_as_far_as_it_goes(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = (*SMALL, f"store={store}", f"hydra.run.dir={tmp_path}")
    run("train", *common, "trainer.max_epochs=1")
    file = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    del content[SETTINGS]
    torch.save(content, file)
    line = fails(capfd, "train", *common, "projection.activation=relu")
    assert "begun with projection.activation='tanh', now projection.activation='relu'" in line
    run("train", *common, "trainer.max_epochs=2")
    assert SETTINGS in torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("images", "change", "message"),
    [
        (3, "data.batch_size=1", "data.batch_size=1: a caption is told apart from others"),
        (1, "data.val_fraction=0", "one image with captions to train on"),
        (3, "data.val_fraction=0.3", "one image with captions to validate on"),
        (3, "data.val_fraction=0.3", "use data.val_fraction=0, give val_store=DIR"),
        (9, "data.val_fraction=0.1", "use data.val_fraction=0.33 (of 9 images) or 0"),
        (9, "val_store={one}", "one: one image with captions to validate on"),
        (9, "trainer.max_epochs=0", "trainer.max_epochs=0: nothing would be trained"),
        (9, "trainer.limit_train_batches=0", "trainer.limit_train_batches=0: nothing"),
    ],
)
def test_nothing_to_tell_apart_is_refused(
    images: int, change: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {"patch_tokens": (6, 8), "avg_self_attn_out": (8,)}
    store = tiny_store(tmp_path / "store", fields, images=images, captions_per_image=3, text_dim=5)
    one = tiny_store(tmp_path / "one", fields, images=1, captions_per_image=3, text_dim=5)
    given = (*SMALL, f"store={store}", f"hydra.run.dir={tmp_path}", "checkpoint.monitor=null")
    assert message in fails(capfd, "train", *given, change.format(one=one))


def test_a_store_without_features_to_compare_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tiny_store(tmp_path / "store", {"self_attn_maps": (2, 6)}, text_dim=5)
    line = fails(capfd, "train", "experiment=vits_infonce", f"store={store}", *TRAIN)
    assert "holds no features of images to compare with texts, only" in line


def test_weights_that_are_not_finite_end_the_run(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the epoch before stays, and no projection is written."""
    given = (*SMALL, f"store={store}", f"hydra.run.dir={tmp_path}", "checkpoint.monitor=null")
    run("train", *given, "trainer.max_epochs=1")
    last, psi = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "projection.safetensors"
    before = last.read_bytes()
    psi.unlink()

    def broken(_: Any, trainer: Any, module: AlignmentModule, *__: Any) -> None:
        next(module.projection.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(SaveMetrics, "on_train_batch_end", broken)
    line = fails(capfd, "train", *given, "trainer.max_epochs=2")
    assert "the weights are not finite after step" in line and "optimizer.lr" in line
    assert last.read_bytes() == before and not psi.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "metrics.json", "loss.png", "logs/hparams.yaml"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
    ],
)
def test_a_folder_with_files_of_the_user_is_refused(
    name: str, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("store: mine\n")
    options = (*SMALL, "resume=false", f"store={store}", f"hydra.run.dir={tmp_path}")
    line = fails(capfd, "train", *options)
    assert f"{tmp_path / name}: is there and was not written by this command" in line
    assert files_of_run(tmp_path) == [tmp_path / name]
    assert (tmp_path / name).read_text() == "store: mine\n"
