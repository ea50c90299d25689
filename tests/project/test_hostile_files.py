"""Files damaged at random, and bombs: one clear line or a sound result, whatever the bytes.

The whole of it, 200 mutations of each kind and every bomb:
python -c "from tests.project.test_hostile_files import main; main(each=200, seed=1)"
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import tempfile
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from talk2dino.alignment.checkpoint import describe_projection, read_checkpoint
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.datasets.label_files import header, read_values
from talk2dino.datasets.pictures import to_pixels
from talk2dino.errors import UserError
from talk2dino.features import FeatureStore
from talk2dino.inference.class_embeddings import ClassEmbeddings
from talk2dino.inference.vocabulary import Words
from talk2dino.training.resume import refuse_other_settings
from tests.helpers.ranks import PRELOAD, forked
from tests.helpers.stores import tiny_store

MOST_BYTES = 2 << 30  # of memory for one file
MOST_SECONDS = 20  # of computing for one file
FIELDS = {"patch_tokens": (5, 4), "self_attn_maps": (2, 5), "avg_self_attn_out": (4,)}


class Planted:
    """Unpickled, it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def make_files(folder: Path) -> Path:
    """One sound file of every kind."""
    folder.mkdir()
    random_ = np.random.default_rng(0)
    pixels = np.cumsum(random_.integers(-3, 4, (40, 52, 3)), axis=1).astype(np.uint8)
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", "a picture" * 20, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "a.png", pnginfo=note, exif=exif)
    Image.fromarray(pixels[..., 0]).quantize(16).save(folder / "labels.png", transparency=3)
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=90)
    Image.fromarray(pixels).save(folder / "b.jpg", progressive=True)
    tiny_store(folder / "store", FIELDS, images=6, captions_per_image=2, images_per_shard=3)
    psi = ProjectionLayer(6, 8)
    entry = json.dumps({"projection": describe_projection(psi), "vision": {"name": "v"}})
    save_file(psi.state_dict(), folder / "psi.safetensors", metadata={"talk2dino": entry})
    made: dict[str, Any] = {
        part: {"spec": {"name": part}, "weights_sha256": "0"}
        for part in ("vision", "text", "projection")
    }
    words = Words(("cat",), (("a cat",), ("a kitty",)), (0, 0), False, ("cat", "kitty"))
    rows = torch.nn.functional.normalize(torch.rand(2, 8))
    ClassEmbeddings(words, rows, "plain", made).save(folder / "classes.safetensors")
    state = {f"projection.{name}": value for name, value in psi.state_dict().items()}
    whole = {"state_dict": state, "talk2dino": {"projection": describe_projection(psi)}}
    whole |= {"loops": {}, "optimizer_states": [], "settings": {"seed": 0}}
    torch.save(whole, folder / "last.ckpt")
    torch.save(psi.state_dict(), folder / "psi.pth")
    return folder


# --- mutations: bytes and a source of chance -> other bytes -----------------------------------


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut, insert, overwrite a length, or move a block."""
    found = bytearray(content)
    place = chance.randrange(len(found))
    match chance.choice(("flip", "cut", "insert", "length", "delete", "move")):
        case "flip":
            for _ in range(chance.randint(1, 8)):
                found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        case "cut":
            del found[place:]
        case "insert":
            found[place:place] = chance.randbytes(chance.randint(1, 64))
        case "length":
            number = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1))
            kind = chance.choice(("<I", ">I", "<Q", ">H"))
            size = struct.calcsize(kind)
            found[place : place + size] = struct.pack(kind, number % (1 << 8 * size))
        case "delete":
            del found[place : place + chance.randint(1, 64)]
        case "move":
            found[place:place] = found[: chance.randint(1, 200)]
    return bytes(found)


def damaged_png(content: bytes, chance: random.Random) -> bytes:
    """Half of them with chunks whose check sums are right, so that a decoder reads on."""
    if chance.random() < 0.5:
        return damage(content, chance)
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    which = chance.randrange(len(chunks))
    kind, data = chunks[which]
    if data and chance.random() < 0.8:
        chunks[which] = kind, damage(data, chance)
    else:
        chunks.insert(chance.randrange(len(chunks)), chunks.pop(which))
    return content[:8] + b"".join(chunk(*one) for one in chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 31, 1 << 70, 1e308, "", "x" * 300, "../../etc/passwd", "\ud800"),
    *([], {}, [0], [[]], {"a": 1}, [1 << 40] * 3, "float64", "builtins.eval"),
)


def damaged_json(content: bytes, chance: random.Random) -> bytes:
    """Half of them JSON still, with another value somewhere, a key more or one less."""
    if chance.random() < 0.4:
        return damage(content, chance)
    if chance.random() < 0.05:
        return b"[" * 100_000
    data = json.loads(content)
    node, path = data, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = chance.choice(keys)
        path.append(node)
        deeper = isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.8
        if not deeper:
            break
        node = node[key]
    if chance.random() < 0.2:
        del node[key]
    else:
        node[key] = chance.choice(VALUES)
    return json.dumps(data).encode()


def damaged_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Half of them with a header that was changed as JSON and has its right length."""
    if chance.random() < 0.4:
        return damage(content, chance)
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    if chance.random() < 0.6:
        parsed = json.loads(header)
        (key,) = parsed["__metadata__"]
        entry = damaged_json(parsed["__metadata__"][key].encode(), chance)
        parsed["__metadata__"][key] = entry.decode("latin-1")
        header = json.dumps(parsed).encode()
    else:
        header = damaged_json(header, chance)
    return struct.pack("<Q", len(header)) + header + rest


def damaged_zip(content: bytes, chance: random.Random) -> bytes:
    """Half of them an archive still, of which one member was changed, pickled code at times."""
    if chance.random() < 0.4:
        return damage(content, chance)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = chance.choice([n for n in names if n.endswith("data.pkl")] * 3 + names)
        for name in names:
            data = old.read(name)
            if name == chosen and data:
                planted = chance.random() < 0.2
                data = pickle.dumps(Planted("planted"), 2) if planted else damage(data, chance)
            new.writestr(name, data)
    return made.getvalue()


# --- readers: all that reads a file of this kind; what is not sound fails an assertion ---------


def read_pixels(file: Path) -> None:
    pixels = to_pixels(file)
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3
    assert header(file).size == tuple(pixels.shape[1:])


def read_labels(file: Path) -> None:
    assert read_values(file).ndim == 2


def read_store(file: Path) -> None:
    store = FeatureStore(file.parent)
    store.verify()
    for table in (store.images, store.captions):
        for name in table.fields:
            assert table[name][: len(table)].shape == table[name].shape, name


def read_projection(file: Path) -> None:
    psi = read_checkpoint(file).projection
    assert sum(value.numel() for value in psi.parameters()) < 1000


def read_classes(file: Path) -> None:
    found = ClassEmbeddings.load(file)
    assert len(found.rows) == len(found.words.rows)


def read_training(file: Path) -> None:
    read_projection(file)
    refuse_other_settings(str(file), {"seed": 0}, {})


Mutation = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, tuple[tuple[str, ...], Mutation, Callable[[Path], None]]] = {
    "PNG": (("a.png", "labels.png"), damaged_png, read_pixels),
    "JPEG": (("a.jpg", "b.jpg"), damage, read_pixels),
    "HDF5 shard": (("store/train-00001.h5",), damage, read_store),
    "manifest": (("store/manifest.json",), damaged_json, read_store),
    "safetensors": (
        ("psi.safetensors", "classes.safetensors"),
        damaged_safetensors,
        read_projection,
    ),
    "ckpt": (("last.ckpt", "psi.pth"), damaged_zip, read_training),
}
READERS = {
    "labels.png": read_labels,
    "classes.safetensors": read_classes,
    "psi.pth": read_projection,
}


# --- bombs: small files of large pictures -------------------------------------------------------


def png_bomb(width: int, height: int, depth: int, color: int) -> bytes:
    """A PNG of zeros, written row by row; `color` is PNG's type."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = bytes(1 + (width * depth * channels + 7) // 8)
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(row * 64) for _ in range(height // 64))
    data += packed.compress(row * (height % 64)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0") if color == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), palette, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def text_bomb(kind: bytes) -> bytes:
    """A PNG with a chunk that unpacks to a gigabyte."""
    small = png_bomb(8, 8, 8, 2)
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(bytes(1 << 20)) for _ in range(1024)) + packed.flush()
    head = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    return small[:33] + chunk(kind, head + data) + small[33:]


BOMBS: dict[str, Callable[[], bytes]] = {
    "bomb-gray.png": lambda: png_bomb(13_000, 13_000, 8, 0),
    "bomb-rgb.png": lambda: png_bomb(13_000, 13_000, 8, 2),
    "bomb-rgba.png": lambda: png_bomb(13_000, 13_000, 8, 6),
    "bomb-palette.png": lambda: png_bomb(13_000, 13_000, 1, 3),
    "bomb-wide.png": lambda: png_bomb(13_000, 13_000, 16, 0),
    "bomb-huge.png": lambda: png_bomb(60_000, 60_000, 1, 0),
    "bomb-line.png": lambda: png_bomb(2_000_000, 80, 8, 2),
    **{f"bomb-{k.decode()}.png": lambda k=k: text_bomb(k) for k in (b"zTXt", b"iTXt", b"iCCP")},
}


# --- children -------------------------------------------------------------------------------------


def attempt(name: str, content: bytes, folder: Path) -> str:
    """What is wrong with how a file is read; empty if nothing."""
    file = folder / name
    file.write_bytes(content)
    plain = Path(name).name
    kind = next((k for k, (names, _, _) in KINDS.items() if name in names), "PNG")
    reader = READERS.get(plain, KINDS[kind][2])
    try:
        reader(file)
    except UserError as error:
        text = str(error)
        return "" if text and "\n" not in text and len(text) < 1000 else f"no line: {text[:500]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {''.join(traceback.format_exception(error))[-1200:]}"
    return ""


def child(jobs: list[tuple[str, int]], source: Path, folder: Path, answer: Connection) -> None:
    """Read mutated files one after another, saying before each of them which it is."""
    torch.set_num_threads(1)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, seed in jobs:
        answer.send(("begin", name, seed))
        bomb = name in BOMBS
        content = BOMBS[name]() if bomb else mutated(name, seed, source)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        wrong = attempt(name, content, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MOST_BYTES:
            wrong = f"{grown / 1e9:.1f} GB of memory; {wrong}"
        if (folder / "planted").exists():
            (folder / "planted").rmdir()
            wrong = f"pickled code was run; {wrong}"
        if not bomb:
            (folder / name).write_bytes((source / name).read_bytes())
        answer.send(("end", wrong, grown))
    answer.send(("done", "", 0))
    answer.close()
    os._exit(0)


def mutated(name: str, seed: int, source: Path) -> bytes:
    mutation = next(m for names, m, _ in KINDS.values() if name in names)
    return mutation((source / name).read_bytes(), random.Random(f"{name} {seed}"))


def read_all(jobs: Iterable[tuple[str, int]], folder: Path) -> Iterator[str]:
    """Read every mutation in children; what went wrong, crashes included."""
    left = list(jobs)
    source = make_files(folder / "sound")
    while left:
        place = folder / f"child-{len(left)}"
        make_files(place)
        mine, theirs = multiprocessing.Pipe(duplex=False)
        process = forked(child, left, source, place, theirs)
        theirs.close()
        with suppress(EOFError):
            while (message := mine.recv())[0] != "done":
                if message[0] == "begin":
                    current = message[1:]
                    left = left[1:]
                elif message[1]:
                    yield f"{current}: {message[1]}"
            left = []
        process.join()
        if process.exitcode:
            yield f"{current}: the interpreter ended with {process.exitcode}"
        mine.close()


def jobs(each: int, seed: int) -> list[tuple[str, int]]:
    """`each` mutations of every kind, spread over its files."""
    return [
        (names[number % len(names)], seed * 100_000 + number)
        for names, _, _ in KINDS.values()
        for number in range(each)
    ]


def main(each: int, seed: int, only: str = "") -> None:
    """Print what went wrong in `each` mutations of every kind and in all bombs."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    todo = [*jobs(each, seed), *((name, 0) for name in BOMBS)]
    todo = [one for one in todo if one[0].startswith(only)]
    with tempfile.TemporaryDirectory() as folder:
        wrong = 0
        for line in read_all(todo, Path(folder)):
            print(line, flush=True)
            wrong += 1
    print(f"{len(todo)} files: {dict(Counter(name for name, _ in todo))}, {wrong} wrong")


@pytest.mark.slow
def test_damaged_files_are_one_line_or_sound(tmp_path: Path) -> None:
    wrong = list(read_all(jobs(each=20, seed=0), tmp_path))
    assert not wrong, "\n".join(wrong)


def test_bombs_are_refused_or_fit_into_two_gigabytes(tmp_path: Path) -> None:
    wrong = list(read_all([("bomb-huge.png", 0), ("bomb-zTXt.png", 0)], tmp_path))
    assert not wrong, "\n".join(wrong)
