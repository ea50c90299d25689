"""Training on the device: beside the CPU, in mixed precision, resumed, and as two ranks."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from benchmarks.gpu_parts.rows import Row, Setting, check, deviation, relative
from benchmarks.gpu_parts.worker import NotHere

TEXT, WIDTH, HEADS, PATCHES, BATCH = 32, 48, 6, 20, 16
Batch = dict[str, Tensor]


def batch_of(seed: int) -> Batch:
    """Features of `BATCH` captions, in double precision."""
    random = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    return {
        "embedding": normal(BATCH, TEXT),
        "disentangled_self_attn": normal(BATCH, HEADS, WIDTH),
        "patch_tokens": normal(BATCH, PATCHES, WIDTH),
        "image_id": torch.arange(BATCH) // 2,
    }


def modules() -> dict[str, Any]:
    """Similarities and losses, with equal weights in every call, in double precision."""
    from talk2dino.alignment import similarity
    from talk2dino.alignment.losses import InfoNCE, TripletLoss
    from talk2dino.alignment.module import AlignmentModule
    from talk2dino.alignment.projection import ProjectionLayer

    masked = partial(InfoNCE, mask_same_image=True, normalize_by_batch_squared=False)
    cases = {
        "max_score": (similarity.MaxScore(), masked()),
        "soft_head, triplet": (similarity.SoftHead(), TripletLoss()),
        "sum of heads": (similarity.SumHeads(), masked()),
        "dense": (similarity.Dense(), masked(learnable_logit_scale=True)),
        "dense in chunks": (similarity.Dense(chunk_size=4), masked()),
    }
    found = {}
    for name, (compared, loss) in cases.items():
        torch.manual_seed(0)
        found[name] = AlignmentModule(
            projection=ProjectionLayer(TEXT, WIDTH),
            similarity=compared,
            loss=loss,
            optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True),
            scheduler=None,
            val_similarity=similarity.DotProduct(),
            encoders={"vision": None, "text": None},
        ).double()
    return found


def gradients(module: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss, and the gradients of all parameters in one vector, on the CPU."""
    scores, image_ids = module.scores(batch)
    loss = module.loss(scores, image_ids)
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    return loss.detach().cpu(), flat.cpu()


def trained(module: Any, device: torch.device, count: int) -> Tensor:
    """The losses of some steps of fused AdamW."""
    module.to(device)
    optimizer, losses = module._optimizer(module.parameters()), []
    for step in range(count):
        optimizer.zero_grad()
        batch = {name: value.to(device) for name, value in batch_of(step % 2).items()}
        losses.append(gradients(module, batch)[0])
        optimizer.step()
    return torch.stack(losses)


def steps(setting: Setting) -> Iterator[Row]:
    """Gradients of one step, and the losses of twenty, in double precision and in float32."""
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        for (name, ours), cpus in zip(modules().items(), modules().values(), strict=True):
            batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(0).items()}
            there = {k: v.to(setting.at) for k, v in batch.items()}
            got = gradients(ours.to(setting.at, dtype), there)[1]
            want = gradients(cpus.to(dtype), batch)[1]
            title = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield check(f"{title}, gradients of a step", relative(got, want), bound)
    for (name, ours), cpus in zip(modules().items(), modules().values(), strict=True):
        count = setting.choose(20, 3)
        got = trained(ours, setting.at, count)
        want = trained(cpus, torch.device("cpu"), count)
        yield check(f"{name}, losses of {count} steps of AdamW", relative(got, want), 1e-6)


def write(folder: Path) -> Path:
    """A store whose captions begin like their images' features, so that a loss can fall."""
    from talk2dino.features import write_store

    random, images = np.random.default_rng(0), 66
    patches = random.standard_normal((images, PATCHES, WIDTH)).astype(np.float32)
    pooled = patches.mean(1)
    captions = {"image_row": np.arange(images), "embedding": pooled[:, :TEXT] * 4}
    write_store(folder, {"patch_tokens": patches, "avg_self_attn_out": pooled}, captions)
    return folder


def fit(
    setting: Setting,
    store: Path,
    precision: str = "32-true",
    accelerator: str | None = None,
    checkpoint: Path | None = None,
    max_patches: int | None = 8,
    epochs: int = 2,
) -> tuple[Any, list[float]]:
    """The real Trainer with the callbacks of `talk2dino.train`; the module and its losses."""
    import lightning as L

    from talk2dino.alignment import similarity
    from talk2dino.alignment.losses import InfoNCE
    from talk2dino.alignment.module import AlignmentModule
    from talk2dino.alignment.projection import ProjectionLayer
    from talk2dino.features import FeatureDataModule
    from talk2dino.training.resume import AtomicCheckpointIO, LastCheckpoint, SeedSteps

    class Losses(L.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.found.append(float(outputs["loss"]))

    class Kept(LastCheckpoint):
        """Keeps what it would overwrite."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            super().on_train_start(trainer, module)
            save = trainer.save_checkpoint
            trainer.save_checkpoint = lambda path, _: save(
                path.with_name(f"{trainer.global_step:03d}.ckpt")
            )

    torch.manual_seed(0)
    module = AlignmentModule(
        projection=ProjectionLayer(TEXT, WIDTH),
        similarity=similarity.Dense(max_patches=max_patches),
        loss=InfoNCE(normalize_by_batch_squared=False),
        optimizer=partial(torch.optim.AdamW, lr=3e-3, fused=True),
        scheduler=None,
        val_similarity=similarity.DotProduct(),
        encoders={"vision": None, "text": None},
    )
    data = FeatureDataModule(store, ("patch_tokens",), batch_size=BATCH, val_fraction=2 / 66)
    losses = Losses()
    here = "gpu" if setting.device == "cuda" else "cpu"
    L.Trainer(
        accelerator=accelerator or here,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        callbacks=[SeedSteps(0), losses, Kept(store.parent / "last.ckpt", every_n_steps=1)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(store.parent),
    ).fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module, losses.found


def precisions(setting: Setting) -> Iterator[Row]:
    """Losses of the real Trainer in every precision beside the CPU's in float32."""
    epochs = setting.choose(10, 2)
    with tempfile.TemporaryDirectory() as name:
        store = write(Path(name) / "store")
        course = partial(fit, setting, store, max_patches=None, epochs=epochs)
        want = torch.tensor(course(accelerator="cpu")[1])
        # 16-mixed may skip steps until its scale fits, and lag behind by as many.
        for precision, bound in {"32-true": 1e-3, "bf16-mixed": 2e-2, "16-mixed": 5e-2}.items():
            if precision == "16-mixed" and setting.device == "cpu":
                yield Row("16-mixed", float("nan"), "", note="on a GPU only")
                continue
            got = torch.tensor(course(precision)[1])
            yield check(f"{precision}, losses of {len(got)} steps", relative(got, want), bound)
            yield check(f"{precision}, last loss / first", float(got[-1] / got[0]), 0.95, "ratio")


def resume(setting: Setting) -> Iterator[Row]:
    """Stopped in the middle of an epoch and resumed: the same weights, bit for bit."""
    precisions = ["32-true", "bf16-mixed"] + ["16-mixed"] * (setting.device == "cuda")
    for precision in precisions:
        with tempfile.TemporaryDirectory() as name:
            store = write(Path(name) / "store")
            want, _ = fit(setting, store, precision)
            middle = Path(name) / "002.ckpt"  # of four steps an epoch
            got, losses = fit(setting, store, precision, checkpoint=middle)
            assert len(losses) == 6, f"{len(losses)} steps after the second of eight"
            worst = max(
                deviation(value, want.state_dict()[key]) for key, value in got.state_dict().items()
            )
            yield check(f"resumed after 2 of 8 steps, {precision}", worst, 0.0)


def two_ranks(setting: Setting) -> Iterator[Row]:
    """Gradients of two processes through DDP beside those of one with the whole batch."""
    if setting.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("one GPU, NCCL needs two")
    backend = "nccl" if setting.device == "cuda" else "gloo"
    alone = {name: gradients(module, batch_of(0)) for name, module in modules().items()}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start_processes(
            rank_of_two, (setting, backend, port, folder), nprocs=2, start_method="spawn"
        )
        parts = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (loss, flat) in alone.items():
        worst = max(relative(part[name][1], flat) for part in parts)
        worst = max(worst, *(deviation(part[name][0], loss) for part in parts))
        yield check(f"{name}, two ranks with {backend}", worst, 1e-9)


def rank_of_two(rank: int, setting: Setting, backend: str, port: int, folder: str) -> None:
    """One process: its half of the batch on its own device."""
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", rank) if setting.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=2)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    batch = {name: value[half].to(device) for name, value in batch_of(0).items()}
    found = {}
    for name, module in modules().items():
        wrapped = DistributedDataParallel(LossOf(module.to(device)))
        loss = wrapped(batch)
        loss.backward()
        flat = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        found[name] = loss.detach().cpu(), torch.cat(flat).cpu()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class LossOf(torch.nn.Module):
    """Scores and loss as a forward pass, for DDP to wrap."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        scores, image_ids = self.module.scores(batch)
        loss: Tensor = self.module.loss(scores, image_ids)
        return loss
