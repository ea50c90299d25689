"""Training steps of the two recipes at growing batches, and what feeding them costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_parts.rows import Row, Setting, compare

TEXT, WIDTH, HEADS, PATCHES = 512, 768, 12, 256  # CLIP ViT-B and ViT-B
BATCHES, FEW = (128, 512, 1024, 2048, 4096), (4, 8)
FED = 1024  # captions of a batch from the store
POOLED, DENSE = "disentangled_self_attn", "patch_tokens"


class Step:
    """A training step of AdamW on a batch in the device's memory, as stored in float16."""

    def __init__(self, setting: Setting, similarity: Any, usual: bool = False) -> None:
        from talk2dino.alignment.losses import InfoNCE
        from talk2dino.alignment.projection import ProjectionLayer

        self.similarity, self.usual = similarity.train(), usual
        self.projection = ProjectionLayer(TEXT, WIDTH).to(setting.at)
        self.loss = InfoNCE()
        parameters = self.projection.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.device = setting.at

    def __call__(self, batch: dict[str, Any], precision: str = "32") -> None:
        from talk2dino.alignment.inputs import projected_text, projected_visual
        from talk2dino.encoders.devices import autocast

        with autocast(precision, self.device):
            text, _ = projected_text(batch, self.projection, self.similarity)
            visual = projected_visual(batch, self.projection, self.similarity)
            chosen = self.similarity.select(text, visual)
            if self.usual:
                scores = usual_dense(text, chosen, self.similarity.temperature)
            else:
                scores = self.similarity.scores(text, chosen)
            loss = self.loss(scores, batch["image_id"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def usual_dense(text: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """The similarity `Dense` as its formula reads: every text's pooled vector of every image."""
    text, patches = F.normalize(text, dim=-1), F.normalize(patches.float(), dim=-1)
    weights = (torch.einsum("td,ipd->tip", text, patches) / temperature).softmax(-1)
    pooled = torch.einsum("tip,ipd->tid", weights, patches)
    return torch.einsum("td,tid->ti", text, F.normalize(pooled, dim=-1))


def steps(setting: Setting) -> Iterator[Row]:
    """Milliseconds and captions per second; then fed from a store, with pinned copies ahead."""
    from talk2dino.alignment.similarity import Dense, MaxScore

    subset = setting.choose(64, 4)  # patches, as in the recipe
    patches = setting.choose(PATCHES, 8)
    for size in setting.choose(BATCHES, FEW):
        batch = {
            "embedding": torch.randn(size, TEXT, device=setting.at),
            "image_id": torch.arange(size, device=setting.at),
            POOLED: torch.randn(size, HEADS, WIDTH, device=setting.at).half(),
            DENSE: torch.randn(size, patches, WIDTH, device=setting.at).half(),
        }
        pooled, dense = Step(setting, MaxScore()), Step(setting, Dense(max_patches=subset))
        chunks = Step(setting, Dense(max_patches=subset, chunk_size=128))
        usual = Step(setting, Dense(max_patches=subset), usual=True)
        title = f"batch {size:4d}"
        ways: dict[str, Callable[[], object]] = {
            precision: partial(pooled, batch, precision) for precision in ("32", "bf16")
        }
        yield from compare(f"{title}, pooled", ways, setting, "32", per=size)
        ways = {
            "the usual way": partial(usual, batch),
            "32": partial(dense, batch),
            "bf16": partial(dense, batch, "bf16"),
            "32 in chunks of 128": partial(chunks, batch),
        }
        yield from compare(f"{title}, dense", ways, setting, "the usual way", per=size)
        del batch
    yield from fed(setting)


def fed(setting: Setting) -> Iterator[Row]:
    """An epoch of steps with pooled features: batches of the store beside one in memory."""
    from talk2dino.alignment.similarity import MaxScore
    from talk2dino.features import FeatureStore, write_store
    from talk2dino.features.batches import CaptionBatches, StoreLoader
    from talk2dino.features.sampler import EpochBatchSampler

    size = setting.choose(FED, 8)
    count, random = setting.choose(8, 2), np.random.default_rng(0)
    rows = size * count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        heads = random.standard_normal((rows, HEADS, WIDTH), dtype=np.float32)
        texts = random.standard_normal((rows, TEXT), dtype=np.float32)
        captions: dict[str, Any] = {"image_row": np.arange(rows), "embedding": texts}
        write_store(folder, {POOLED: heads}, captions)
        data = CaptionBatches(FeatureStore(folder), (POOLED,), ("embedding",))
        on_gpu = setting.device == "cuda"
        loader = StoreLoader(
            data,
            np.arange(rows),
            EpochBatchSampler(data.image_row, size),
            prefetch=2 if on_gpu else 0,
            pin_memory=on_gpu,
        )
        step = Step(setting, MaxScore())
        there = partial(moved, device=setting.at)
        kept = there(next(iter(loader)))

        def all_steps(batches: Iterable[dict[str, Any]]) -> None:
            for batch in batches:
                step(there(batch))

        ways = {
            "in memory": partial(all_steps, [kept] * count),
            "from the store": partial(all_steps, loader),
        }
        title = f"{count} steps of {size}, pooled"
        yield from compare(title, ways, setting, "in memory", per=rows)
        loader.close()


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
