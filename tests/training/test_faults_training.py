"""Real trainings that are killed at random points and started again lose nothing.

More kills than the test's:
python -c "from tests.training.test_faults_training import main; main(100, 1)"
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from talk2dino.alignment.module import AlignmentModule
from tests.helpers.pipeline import TRAIN, run
from tests.helpers.ranks import PRELOAD, forked
from tests.helpers.stores import tiny_store

IMAGES, HELD_OUT = 36, 4
STEPS, EPOCHS = 16, 3  # batches of four captions, two batches per optimizer step
OPTIONS = (
    "experiment=vits_infonce",
    "projection.text_dim=6",
    "projection.vision_dim=8",
    "similarity=sampled_head",  # draws random numbers in every step
    f"data.val_fraction={HELD_OUT / IMAGES}",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=2",
    f"trainer.max_epochs={EPOCHS}",
    "scheduler=cosine",
    "ema.decay=0.9",
    "checkpoint.every_n_steps=2",
    "resume=true",
)
# What touches the run folder: a kill just before one of these leaves every state on the disk.
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def make_store(folder: Path) -> Path:
    fields = {"disentangled_self_attn": (3, 8), "avg_self_attn_out": (8,)}
    return tiny_store(
        folder, fields, images=IMAGES, captions_per_image=2, text_dim=6, images_per_shard=10
    )


def train(store: Path, folder: Path, step: int | None, operation: int | None) -> None:
    """Run in a process of its own; dies at that training step or file operation, counted here."""
    torch.set_num_threads(1)
    log = os.open(folder / "steps.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original, left = AlignmentModule.training_step, [step]

    def recorded(module: AlignmentModule, batch: dict[str, Any], index: int) -> torch.Tensor:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        trainer = module.trainer
        rows = " ".join(map(str, batch["caption_row"].tolist()))
        loss: torch.Tensor = original(module, batch, index)
        place = f"{trainer.current_epoch} {index} {trainer.global_step}"
        os.write(log, f"{place}: {rows} {loss.item():.9g}\n".encode())
        return loss

    AlignmentModule.training_step = recorded  # type: ignore[method-assign]
    if operation is not None:
        sys.addaudithook(_Killer(folder / "run", operation))
    run("train", *OPTIONS, *TRAIN, f"store={store}", f"hydra.run.dir={folder / 'run'}")


class _Killer:
    """Counts the operations on files of the run folder."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.left = str(folder), kill_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def start(store: Path, folder: Path, **kill: int | None) -> BaseProcess:
    """Fork a training from a server that has imported everything already."""
    folder.mkdir(exist_ok=True)
    return forked(train, store, folder, **{"step": None, "operation": None} | kill)


def finish(process: BaseProcess) -> bool:
    """Whether the process came to its end; False if it was killed."""
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def differences(folder: Path, whole: Path) -> int:
    """Steps, weights and figures of a run that are lost or differ from the whole one's."""
    want = (whole / "steps.txt").read_text().splitlines()
    assert len(want) == STEPS * EPOCHS == len(set(want))
    got = (folder / "steps.txt").read_text().splitlines()
    wrong = len(set(want) ^ set(got))  # a step that was taken again must be the same again
    weights = [f / "run" / "projection.safetensors" for f in (folder, whole)]
    wrong += weights[0].read_bytes() != weights[1].read_bytes()
    figures = [json.loads((f / "run" / "metrics.json").read_text()) for f in (folder, whole)]
    for content in figures:
        del content["seconds"]
    return wrong + (figures[0] != figures[1])


def kill_and_resume(folder: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Train again and again, killed at least `kills` times; (kills, runs, differences).

    A third of the kills each come after a random time, at a random step, and at a random file
    operation.
    """
    chance = random.Random(seed)
    store = make_store(folder / "store")
    started = time.perf_counter()
    assert finish(start(store, folder / "whole"))
    duration = time.perf_counter() - started
    killed = runs = wrong = 0
    while killed < kills:
        run_folder = folder / f"killed-{runs}"
        runs += 1
        done = False
        while not done:
            kind = chance.choice(["time", "step", "operation"]) if killed < kills else None
            moment = chance.random()
            process = start(
                store,
                run_folder,
                step=int(moment * 24) if kind == "step" else None,
                operation=int(moment * 60) if kind == "operation" else None,
            )
            if kind == "time":
                process.join(moment * duration)
                process.kill()
            done = finish(process)
            killed += not done
        wrong += differences(run_folder, folder / "whole")
    return killed, runs, wrong


@pytest.mark.slow
def test_killed_trainings_equal_one_that_was_not(tmp_path: Path) -> None:
    killed, runs, wrong = kill_and_resume(tmp_path, kills=10, seed=5)
    assert killed >= 10
    assert wrong == 0, f"{killed} kills over {runs} runs: {wrong} steps or files differ"


def main(kills: int, seed: int) -> None:
    """Print how many kills lost how many steps."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        killed, runs, wrong = kill_and_resume(Path(folder), kills, seed)
    print(f"{killed} kills over {runs} runs: {wrong} lost or different steps and files")
