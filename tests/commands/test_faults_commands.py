"""Every command that writes, killed or refused by the disk at a random file operation.

More faults than the tests', over all commands and the slow ones too:
python -c "from tests.commands.test_faults_commands import main; main(kills=100, seed=1)"
and with a file of the user's at every name that they write:
python -c "from tests.commands.test_faults_commands import foreign; foreign()"
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.__main__ import commands
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from tests.helpers.evaluations import write_benchmark
from tests.helpers.pipeline import TRAIN, run
from tests.helpers.ranks import PRELOAD, forked
from tests.helpers.stores import CLIP, ENCODERS, tiny_store

FAULTS = int(os.environ.get("TALK2DINO_KILLS", "12"))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.rmdir")
DISK = {"full": errno.ENOSPC, "read-only": errno.EROFS}
HEADS = {"disentangled_self_attn": (2, 8), "avg_self_attn_out": (8,)}


@dataclass(frozen=True)
class Case:
    """A command line that writes below `out` and `run`, seen from its working directory.

    Attributes:
        arguments: command and overrides; only relative paths.
        final: refuses to run once its results are there.
        slow: left to `main`.
    """

    arguments: tuple[str, ...]
    final: bool = False
    slow: bool = False


MODEL = ("checkpoint=given/psi.safetensors", "accelerator=cpu")
SCORE = ("checkpoint=given/psi.safetensors", "benchmark=custom", "benchmark.root=given/bench")
TRAINING = (
    *("experiment=vits_infonce", "store=given/store", "projection.text_dim=4"),
    *("projection.vision_dim=8", "data.batch_size=4", "data.val_fraction=0.25", *TRAIN),
)
CASES = {
    "extract": Case(
        (
            *("extract", "source=folder", "source.images=given/photos", *ENCODERS, "store=out"),
            *("vision.image_size=32", "images_per_shard=2", "num_workers=0", "accelerator=cpu"),
            "hydra.run.dir=run",
        )
    ),
    "train": Case(
        (
            *("train", *TRAINING, "trainer.max_epochs=2", "checkpoint.every_n_steps=1"),
            *("resume=true", "hydra.run.dir=out"),
        )
    ),
    "train -m": Case(
        ("train", "-m", *TRAINING, "trainer.max_epochs=1", "seed=0,1", "hydra.sweep.dir=out"),
        slow=True,
    ),
    "evaluate": Case(
        (
            *("evaluate", *SCORE, "benchmark.images=images", "benchmark.masks=masks"),
            *("benchmark.classes=classes.json", "benchmark.short_side=32", "benchmark.window=32"),
            *("benchmark.stride=16", "benchmark.input_size=32", "pictures=1", "label_maps=true"),
            *("examples=1", "num_workers=0", "batch_size=1", *TRAIN, "hydra.run.dir=out"),
        )
    ),
    "calibrate": Case(
        (
            *("calibrate", *MODEL, "images=given/photos", "tokens=100", "short_side=160"),
            "output=out/calibration.safetensors",
        )
    ),
    "compare": Case(("compare", "given/evaluated", "--output", "out")),
    "segment": Case(
        (
            *("segment", *MODEL, "image=given/photos", "classes=[cat,sofa]", "output=out"),
            *("short_side=32", "pamr=false", "heatmaps=true", "resume=true"),
        )
    ),
    "video": Case(
        (
            *("video", *MODEL, "video=given/clip.mp4", "classes=[cat,sofa]"),
            *("output=out/clip.mp4", "short_side=32"),
        ),
        slow=True,
    ),
    "map": Case(
        (
            *("map", *MODEL, "image=given/photos/0.png", "classes=[cat,sofa]", "window=32"),
            *("output=out/labels.tif", "pamr=false", "polygons=true"),
        )
    ),
    "embed": Case(
        ("embed", *MODEL, "classes=[cat,sofa]", "output=out/classes.safetensors"), final=True
    ),
    "search": Case(
        ("search", *MODEL, "store=given/dense", "query=[cat,sofa]", "output=out", "recall=true")
    ),
    "embed, shown": Case(
        (
            *("embed", *MODEL, "exemplars=given/shown", "short_side=32"),
            "output=out/classes.safetensors",
        ),
        final=True,
    ),
    "export": Case(("export", MODEL[0], "output=out", "image_size=32", "tolerance=0.001")),
    "export, everything": Case(
        (
            *("export", MODEL[0], "output=out", "image_size=32", "tolerance=0.001"),
            *("classes=[cat,sofa]", "text_tower=true", "int8=true", "int8_tolerance=10"),
        ),
        slow=True,
    ),
    "convert weights": Case(
        ("convert", "weights", "input=given/psi.safetensors", "output=out/psi.pth"), final=True
    ),
    "convert model": Case(
        (
            *("convert", "weights", "input=given/wide.safetensors", "output=out/model"),
            *("vision=dinov2_vitb14_reg", "vision.weights=random"),
            *("text=clip_vitb16", "text.weights=random"),
        ),
        final=True,
        slow=True,
    ),
    "convert features": Case(
        ("convert", "features", "input=given/features.pth", "store=out", "images_per_shard=2"),
        final=True,
    ),
    "convert tars": Case(
        ("convert", "tars", "input=given/tars", "store=out", "images_per_shard=2"), final=True
    ),
    "convert archive": Case(("convert", "archive", "store=given/store", "output=out"), final=True),
    "convert unarchive": Case(
        ("convert", "unarchive", "store=given/archive", "output=out"), final=True
    ),
    "convert coco_object": Case(
        ("convert", "coco_object", "input=given/maps", "output=out", "num_workers=0")
    ),
}
# Extraction and training have their own tests with more kills; the others write as these do.
QUICK = (
    "evaluate",
    "compare",
    "segment",
    "map",
    "embed",
    "search",
    "convert archive",
    "convert coco_object",
)
READ_ONLY = {"app", "serve", "doctor"}  # commands that write no file


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        kind: `kill`, `full` or `read-only`, from the operation `at` on; `kill writing`, or `no
            room`, once a file exceeds `at` bytes, whichever library writes it; `none`.
        at: counted from 1.
        folder: in which the operations are counted.
    """

    kind: str = "none"
    at: int = 0
    folder: str = ""
    seen: int = field(default=0, init=False)

    def begin(self) -> None:
        """Let it come, in this process."""
        if self.kind in ("kill writing", "no room"):
            ends = self.kind == "kill writing"
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if ends else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, resource.RLIM_INFINITY))
        else:
            sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and int(arguments[2] or 0) & WRITING
        if not (opened or event in CHANGES) or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = str(Path(arguments[0]).absolute())
        if not path.startswith(self.folder) or "/given" in path:
            return
        self.seen += 1
        if self.kind == "none" or self.seen < self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        frees = event in ("os.remove", "os.rmdir", "os.chmod")
        if self.kind == "read-only" or not frees:
            raise OSError(DISK[self.kind], os.strerror(DISK[self.kind]), arguments[0])


def attempt(here: Path, arguments: Sequence[str], fault: Fault, answer: Connection) -> None:
    """Run in a process of its own: (exit status, stderr, operations)."""
    torch.set_num_threads(1)
    os.chdir(here)
    os.environ["TALK2DINO_CACHE"] = str(here / "given" / "cache")
    said, status = io.StringIO(), 0
    fault.folder = str(here)
    fault.begin()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            run(*arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except BaseException:
            status = 99
            traceback.print_exc()
    answer.send((status, said.getvalue(), fault.seen))
    answer.close()
    os._exit(0)


def start(here: Path, case: Case, fault: Fault) -> tuple[int, str, int] | None:
    """What `attempt` answers; None if it was killed."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = forked(attempt, here, case.arguments, fault, theirs)
    theirs.close()
    answer = None
    with suppress(EOFError):
        answer = mine.recv()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), process.exitcode
    return answer


def prepare(folder: Path) -> Path:
    """What the commands read, and files of the user's where they write."""
    given, random_ = folder / "given", np.random.default_rng(0)
    (given / "photos").mkdir(parents=True)
    for number in range(3):
        pixels = random_.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(given / "photos" / f"{number}.png")
        (given / "photos" / f"{number}.txt").write_text(f"picture {number}\n")
    (given / "shown" / "left").mkdir(parents=True)
    Image.fromarray(pixels).save(given / "shown" / "left" / "a.png")
    left = (np.arange(pixels.shape[1]) < pixels.shape[1] // 2) * np.ones(len(pixels))[:, None]
    Image.fromarray(left.astype(np.uint8)).save(given / "shown" / "left" / "a_mask.png")
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder(CLIP, weights="random", templates="plain")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    torch.manual_seed(0)
    psi = ProjectionLayer(text.embed_dim, vision.embed_dim)
    save_projection(psi, given / "psi.safetensors", specs)
    save_projection(ProjectionLayer(512, 768), given / "wide.safetensors", specs)
    tiny_store(given / "store", HEADS, images=12, images_per_shard=4)
    patches = {"patch_tokens": (4, vision.embed_dim)}
    tiny_store(given / "dense", patches, text_dim=text.embed_dim, vision=vision.describe())
    write_benchmark(given / "bench", count=2, size=(32, 40))
    write_features(given)
    write_clip(given / "clip.mp4")
    maps = given / "maps" / "val2017"
    maps.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.array([[0, 1, 89], [91, 181, 255]], np.uint8)).save(
            maps / f"{number}.png"
        )
    here = Path.cwd()
    os.chdir(folder)
    os.environ["TALK2DINO_CACHE"] = str(given / "cache")
    try:
        with redirect_stdout(io.StringIO()):
            run("convert", "archive", "store=given/store", "output=given/archive")
            evaluate = CASES["evaluate"].arguments
            run(
                *(a.replace("hydra.run.dir=out", "hydra.run.dir=given/evaluated") for a in evaluate)
            )
    finally:
        del os.environ["TALK2DINO_CACHE"]
        os.chdir(here)
    for name in ("notes.txt", "out/notes.txt", "out/photo.json", "run/mine.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("the user's\n")
    return folder


def write_features(folder: Path) -> None:
    """Features as the original's scripts keep them: one .pth, and a tar of one per image."""
    draw = torch.Generator().manual_seed(0)
    images = [
        {"id": n, "file_name": f"{n}.jpg", "avg_self_attn_out": torch.randn(8, generator=draw)}
        for n in range(5)
    ]
    captions = [
        {"id": n, "image_id": n, "caption": f"{n}", "ann_feats": torch.randn(4, generator=draw)}
        for n in range(5)
    ]
    torch.save({"images": images, "annotations": captions}, folder / "features.pth")
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for image, caption in zip(images, captions, strict=True):
            buffer = io.BytesIO()
            torch.save(caption | {k: v for k, v in image.items() if k != "id"}, buffer)
            info = tarfile.TarInfo(f"{image['id']}.pth")
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))


def write_clip(path: Path) -> None:
    """A video of three frames, where its library is."""
    with suppress(ImportError):
        import av

        with av.open(str(path), "w") as made:
            stream = made.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 40, 64, "yuv420p"
            for number in range(3):
                pixels = np.full((40, 64, 3), 60 * number, np.uint8)
                made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            made.mux(stream.encode(None))


def visible(folder: Path) -> dict[str, bytes]:
    """Files by name, without those under temporary names and what Hydra keeps for itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


GROWING = re.compile(r"\.log$|logs/|records/part-|multirun\.yaml$|environment\.json$|cache/")
TIMES = re.compile(rb'"seconds": [\d.e-]+|<b>[\d.]+</b><span>images per second')


def comparable(name: str, content: bytes) -> bytes:
    """A file without what depends on the clock."""
    if name.endswith(".ckpt"):
        state = torch.load(io.BytesIO(content), weights_only=True)["state_dict"]
        return b"".join(value.numpy().tobytes() for value in state.values())
    if "sweep." in name:  # with a column of seconds, and a picture of it
        return b"" if name.endswith(".png") else re.sub(rb" *-*\d+\.\d+ *", b"", content)
    return TIMES.sub(b"", content) if name.endswith((".json", ".html")) else content


class Trial:
    """A command in a folder of its own, compared with a run that nothing disturbed."""

    def __init__(self, name: str, given: Path, folder: Path) -> None:
        self.name, self.case, self.given = name, CASES[name], given
        self.here, self.whole = folder / "here", folder / "whole"
        self.renew()
        answer = start(self.here, self.case, Fault())
        assert answer is not None and answer[0] == 0, (name, answer)
        self.operations = answer[2]
        self.here.rename(self.whole)
        self.want = self.results(self.whole)
        self.largest = max(map(len, visible(self.whole / "out").values()))
        self.renew()

    def renew(self) -> None:
        """Begin again with nothing written."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.given, self.here)
        self.users = visible(self.here)

    def results(self, folder: Path) -> dict[str, bytes]:
        """What a command wrote, without the clock and what may be incomplete by design."""
        found = visible(folder).items()
        return {k: comparable(k, v) for k, v in found if not GROWING.search(k)}

    def fault(self, chance: random.Random) -> Fault:
        kind = chance.choice(("kill", "kill", "kill writing", "full", "read-only", "no room"))
        most = self.largest if kind in ("kill writing", "no room") else self.operations
        return Fault(kind, chance.randint(1, most))

    def suffer(self, fault: Fault) -> list[str]:
        """Run into a fault; what is wrong afterwards."""
        answer = start(self.here, self.case, fault)
        wrong = [] if answer is None else self.judge(*answer[:2])
        return [f"{self.name}, {fault.kind} at {fault.at}: {one}" for one in wrong + self.changed()]

    def judge(self, status: int, said: str) -> list[str]:
        lines = [line for line in said.splitlines() if line.strip()]
        if status == 0 or (status in (1, 2) and 0 < len(lines) <= 2 and "Traceback" not in said):
            return []
        if status == 1 and "-m" in self.case.arguments and "Traceback" not in said:
            return []  # a line for every job of a sweep
        return [f"status {status}: {said[-1500:]}"]

    def changed(self) -> list[str]:
        """Files of the user's that changed; results that are neither absent nor complete."""
        found = visible(self.here)
        wrong = [f"{k}: changed" for k, v in self.users.items() if found.get(k) != v]
        for name in found.keys() - self.users.keys():
            if GROWING.search(name):
                continue
            try:
                same = comparable(name, found[name]) == self.want.get(name)
            except Exception as error:  # half a checkpoint
                same, found[name] = False, str(error).encode()
            if not same and not self.earlier(name, found[name]):
                wrong.append(f"{name}: half-written, {found[name][-200:]!r}")
        return wrong

    def among_foreign_files(self, names: str = "") -> list[str]:
        """Run with a file of the user's at each name that the command writes, one at a time."""
        wrong = []
        written = sorted(visible(self.whole).keys() - self.users.keys())
        for name in [name for name in written if re.search(names, name)]:
            self.renew()
            file = self.here / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("the user's\n")
            answer = start(self.here, self.case, Fault())
            assert answer is not None
            found = self.judge(*answer[:2])
            if not file.is_file() or file.read_bytes() != b"the user's\n":
                found.append("not the user's any more")
            wrong += [f"{self.name}, {name} of the user's: {one}" for one in found]
        return wrong

    def earlier(self, name: str, content: bytes) -> bool:
        """Whether a file is a complete one of an earlier moment of the same run."""
        if name.endswith(".ckpt"):
            with suppress(Exception):
                return bool(torch.load(io.BytesIO(content), weights_only=True)["state_dict"])
        if name.endswith("failed.json"):
            return "error" in json.loads(content)
        return "/sweep." in name and content.endswith((b"\n", b"IEND\xaeB`\x82"))

    def finish(self) -> list[str]:
        """Run undisturbed; how the results differ from those of `whole`."""
        answer = start(self.here, self.case, Fault())
        assert answer is not None
        status, said, _ = answer
        wrong = []
        if status and not (self.case.final and "already" in said):
            wrong.append(f"started again: status {status}: {said[-1500:]}")
        got = self.results(self.here)
        for name in sorted(got.keys() | self.want.keys()):
            if got.get(name) != self.want.get(name):
                kind = "absent" if name not in got else "more" if name not in self.want else "other"
                wrong.append(f"started again: {name}: {kind}")
        return [f"{self.name}: {one}" for one in wrong]


def trials(names: Sequence[str], given: Path, folder: Path) -> Iterator[Trial]:
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        yield Trial(name, given, folder / str(number))
        shutil.rmtree(folder / str(number))


def disturb(trial: Trial, faults: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """`faults` of them in a few chains, each of which ends with an undisturbed run."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    while done.total() < faults:
        trial.renew()
        for _ in range(min(chance.randint(1, 3), faults - done.total())):
            fault = trial.fault(chance)
            wrong += trial.suffer(fault)
            done[fault.kind] += 1
        wrong += trial.finish()
    return done, wrong


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults") / "template")


@pytest.mark.slow
def test_faults_leave_whole_files_and_the_users_own(given: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    total: Counter[str] = Counter()
    for trial in trials(QUICK, given, tmp_path):
        done, wrong = disturb(trial, -(-FAULTS // len(QUICK)), chance)
        assert not wrong, "\n".join(wrong)
        total += done
    assert total.total() >= FAULTS and total["kill"] + total["kill writing"] >= FAULTS // 3


def test_files_of_the_users_stay_where_results_would_go(given: Path, tmp_path: Path) -> None:
    names = {"convert archive": "", "compare": "", "evaluate": r"environment|results|0\.png"}
    for trial in trials(tuple(names), given, tmp_path):
        wrong = trial.among_foreign_files(names[trial.name])
        assert not wrong, "\n".join(wrong)


def test_every_command_that_writes_has_its_case() -> None:
    assert {case.arguments[0] for case in CASES.values()} == commands().keys() - READ_ONLY


def main(kills: int, seed: int, only: str = "") -> None:
    """Print what went wrong in at least `kills` faults over all commands."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    chance = random.Random(seed)
    names = [name for name in CASES if re.match(only, name)]
    each = {name: 1 + 3 * (not CASES[name].slow) for name in names}
    each = {name: -(-kills * share // sum(each.values())) for name, share in each.items()}
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for trial in trials(names, prepare(Path(folder) / "template"), Path(folder)):
            done, wrong = disturb(trial, each[trial.name], chance)
            total += done
            print(f"{trial.name}: {trial.operations} operations, {dict(done)}", flush=True)
            print("\n".join(f"  {line}" for line in wrong) or "  nothing wrong", flush=True)
    print(f"{total.total()} faults: {dict(total)}")


def foreign(only: str = "") -> None:
    """Print what went wrong with a file of the user's in the place of each result."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(Path(folder) / "template")
        names = [name for name in CASES if re.match(only, name)]
        for trial in trials(names, given, Path(folder)):
            wrong = trial.among_foreign_files()
            print(trial.name, *wrong or ["nothing wrong"], sep="\n  ", flush=True)
