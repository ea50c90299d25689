"""What version 0.1 wrote still loads, goes on where it stopped, and gives the same numbers.

The files lie in `tests/data/written_by_0_1`, what that version made of them in its `expected/`.
Every test works in a copy of the folder, with the command lines that the runs noted themselves.
Only the public interface is used: commands, their keys, and the names that README and docs show.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from talk2dino import Talk2DINO, load_projection
from talk2dino.features import FeatureDataModule, FeatureStore
from tests.data.written_by_0_1.parts import HERE, batches, segmented, write_bert, write_encoders
from tests.helpers.pipeline import BUNDLED, need, run

STORES = ("extracted", "arrays", "archive", "original")
RUNS = ("max_score", "dense_ema", "static_heads", "clip_last_layer")
STOPPED = ("stopped", "stopped_refined", "stopped_mosaic")
METRIC = "val/text_to_image/recall@1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the weights of the tiny encoders, which are drawn and not stored."""
    folder = tmp_path_factory.mktemp("written") / "folder"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_encoders(folder)
    return folder


@pytest.fixture
def here(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; paths in the files are relative to it."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    return folder


def expected(name: str) -> dict[str, NDArray[Any]]:
    """Arrays of `expected/NAME.npz`."""
    with np.load(HERE / "expected" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def expected_json(name: str) -> Any:
    return json.loads((HERE / "expected" / f"{name}.json").read_text())


def below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def command_line(folder: Path, without: Sequence[str] = ()) -> list[str]:
    """The overrides that a run folder was made with."""
    lines: list[str] = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    return [line for line in lines if line.partition("=")[0].lstrip("+") not in without]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def same(value: object) -> object:
    """NumPy's texts and those of HDF5 as plain ones."""
    array = np.asarray(value)
    return array.astype(str).tolist() if array.dtype.kind in "OSU" else array


# --- feature stores -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORES)
def test_stores(here: Path, name: str) -> None:
    """Every shard is whole, and every row of every field has its value."""
    if name == "archive":
        need("hdf5plugin")
    store = FeatureStore(here / "stores" / name)
    assert store.verify() == []
    wanted = below(expected("stores"), f"{name}/")
    assert {key.split("/")[0] for key in wanted} == {"images", "captions"}
    for key, values in wanted.items():
        table, field = key.split("/")
        fields = getattr(store, table)
        assert len(fields) == len(values)
        for chosen in (slice(None), np.arange(len(values))[::-1], [0, len(values) - 1]):
            got = fields[field][chosen]
            if values.dtype.kind == "U":
                assert same(got) == values[chosen].tolist()
            else:
                assert got.dtype == values.dtype
                np.testing.assert_array_equal(got, values[chosen])


def test_the_command_verifies_stores(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("extracted", "arrays", "original"):
        run("convert", "verify", f"store=stores/{name}")
        assert "stores" in capsys.readouterr().out


def test_an_archive_becomes_the_same_bytes(here: Path) -> None:
    need("hdf5plugin")
    run("convert", "unarchive", "store=stores/archive", "output=back")
    for shard in sorted((here / "stores" / "arrays").glob("*.h5")):
        assert (here / "back" / shard.name).read_bytes() == shard.read_bytes()


def test_a_stopped_extraction_goes_on(here: Path) -> None:
    """The finished shard stays; the other one is that of the extraction that was not stopped."""
    first = here / "stores" / "stopped" / "train-00000.h5"
    before = (first.stat().st_mtime_ns, first.read_bytes())
    run("extract", *command_line(here / "extracted/stopped"), "hydra.run.dir=again")
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    store = FeatureStore(here / "stores" / "stopped")
    assert store.verify() == []
    for key, values in below(expected("stores"), "extracted/").items():
        table, field = key.split("/")
        got = getattr(store, table)[field][:]
        if values.dtype.kind == "U":
            assert same(got) == values.tolist()
        else:
            np.testing.assert_allclose(got, values, rtol=1e-2, atol=1e-2)  # float16


def test_batches_of_a_store(here: Path) -> None:
    data = FeatureDataModule(
        "stores/extracted", ["patch_tokens"], batch_size=8, val_fraction=0.25, seed=3
    )
    got = batches(data)
    for name, values in expected("batches").items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


# --- projections and models -----------------------------------------------------------------------

PROJECTIONS = sorted(path.name for path in (HERE / "projections").iterdir())


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(here: Path, name: str) -> None:
    """Class, arguments and weights: same tensors, same outputs."""
    file = here / "projections" / name
    projection = load_projection(file)
    stem = file.stem
    stored = load_file(file.with_suffix(".safetensors"))
    state = projection.state_dict()
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(state[key], value), key
    wanted = below(expected("projections"), f"{stem}/")
    inputs = [torch.from_numpy(wanted[place]) for place in ("0", "1") if place in wanted]
    with torch.no_grad():
        got = projection(*inputs)
    np.testing.assert_allclose(got.numpy(), wanted["out"], rtol=1e-4, atol=1e-5)


def test_every_file_of_a_run_is_a_checkpoint(here: Path) -> None:
    folder = here / "runs" / "max_score"
    files = [folder / "projection.safetensors", folder / "checkpoints" / "last.ckpt"]
    first, second = (load_projection(file).state_dict() for file in files)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", ["saved", "mlp", "visual"])
def test_models(here: Path, name: str) -> None:
    """A folder of `save_pretrained`, and files that name three kinds of encoders."""
    if name == "mlp":
        need("transformers")
        write_bert(here)
    elif name == "visual":
        need(*BUNDLED)
    model = Talk2DINO.from_pretrained(
        name if name == "saved" else f"projections/{name}.safetensors", device="cpu"
    )
    wanted = below(expected("models"), f"{name}/")
    got = segmented(model)
    assert got.pop("classes").tolist() == wanted.pop("classes").tolist()
    for key, values in wanted.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-3, atol=1e-3, err_msg=key)


@pytest.mark.parametrize("place", ["runs/dense_ema", "runs/dense_ema/checkpoints/last.ckpt"])
def test_a_run_is_the_model_that_was_saved(here: Path, place: str) -> None:
    model = Talk2DINO.from_pretrained(place, device="cpu")
    wanted = below(expected("models"), "saved/")
    got = model.encode_text(["a red square", "the blue picture"]).numpy()
    np.testing.assert_allclose(got, wanted["text"], rtol=1e-3, atol=1e-3)


def test_a_saved_model_saves_itself_again(here: Path) -> None:
    Talk2DINO.from_pretrained("saved", device="cpu").save_pretrained("copy")
    old, new = (load_file(f"{name}/projection.safetensors") for name in ("saved", "copy"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    before, after = (json.loads(Path(n, "config.json").read_text()) for n in ("saved", "copy"))
    assert before.keys() <= after.keys()
    for side in ("vision", "text"):
        assert before[side]["name"] == after[side]["name"]


# --- training -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on(here: Path, name: str) -> None:
    """`resume=true`: the weights of a run that went on at once, and whole curves."""
    folder, wanted = here / "runs" / name, expected_json("resumed")[name]
    before = json.loads((folder / "metrics.json").read_text())
    old = command_line(folder, without=["trainer.max_epochs"])
    epochs = f"trainer.max_epochs={wanted['epochs']}"
    run("train", *old, epochs, "resume=true", f"hydra.run.dir={folder}")
    state = load_projection(folder / "projection.safetensors").state_dict()
    weights = below(expected("resumed"), f"{name}/")
    assert state.keys() == weights.keys()
    moved = load_file(HERE / "runs" / name / "projection.safetensors")
    assert any(not torch.equal(value, moved[key]) for key, value in state.items())
    for key, values in weights.items():
        got, want = state[key].numpy(), values
        if key.endswith("attn.in_proj_bias"):
            # a bias of all keys changes no softmax: its gradient is rounding, its steps are Adam's
            got, want = (np.delete(one.reshape(3, -1), 1, axis=0) for one in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4, err_msg=key)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == wanted["steps"] > before["steps"]
    assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-3)
    assert metrics["validation"][: len(before["validation"])] == before["validation"]
    assert len(metrics["validation"]) == len(wanted["validation"])
    for got, want in zip(metrics["validation"], wanted["validation"], strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    kept = torch.load(HERE / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
    [curve] = [state for key, state in kept["callbacks"].items() if key.startswith("LossCurve")]
    assert metrics["seconds"] >= round(curve["seconds"], 2)  # the time before counts
    steps = [int(row["step"]) for row in rows(folder / "logs" / "metrics.csv")]
    assert min(steps) >= before["steps"] - 1  # nothing was trained again
    logs = rows(folder / "logs" / "metrics.1.csv")
    assert logs == rows(HERE / "runs" / name / "logs" / "metrics.csv")


def test_training_goes_on_in_another_folder(here: Path) -> None:
    """`ckpt_path` reads the checkpoint and leaves the old run alone."""
    old = command_line(here / "runs/max_score", without=["trainer.max_epochs"])
    last = "ckpt_path=runs/max_score/checkpoints/last.ckpt"
    run("train", *old, "trainer.max_epochs=6", last, "hydra.run.dir=elsewhere")
    state = load_projection("elsewhere/projection.safetensors").state_dict()
    for key, values in below(expected("resumed"), "max_score/").items():
        np.testing.assert_allclose(state[key].numpy(), values, rtol=1e-3, atol=1e-4, err_msg=key)


def test_the_config_of_a_run_trains_it_again(here: Path) -> None:
    """`config.yaml` names every part by its old place; the same seed gives the same weights."""
    config = ("--config-path", str(here / "runs" / "dense_ema"), "--config-name", "config")
    run("train", *config, "logger.save_dir=again", "hydra.run.dir=again")
    got, want = (
        load_file(f"{place}/projection.safetensors") for place in ("again", "runs/dense_ema")
    )
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4)


# --- evaluation -----------------------------------------------------------------------------------


def compare_results(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    assert got.keys() == want.keys()
    assert (got["benchmark"], got["images"]) == (want["benchmark"], want["images"])
    for key in ("miou", "pixel_accuracy"):
        assert got[key] == pytest.approx(want[key], abs=0.5), key
    assert got["per_class"].keys() == want["per_class"].keys()
    for name, value in want["per_class"].items():
        if value is None:
            assert got["per_class"][name] is None, name
        else:
            assert got["per_class"][name] == pytest.approx(value, abs=0.5), name


def parts(folder: Path) -> dict[str, list[str]]:
    """Names of the finished images by file of records; half a line is none."""
    found: dict[str, list[str]] = {}
    for file in sorted((folder / "records").glob("part-*.jsonl")):
        found[file.name] = []
        for line in file.read_text().splitlines():
            if line.endswith("}"):
                found[file.name].append(json.loads(line)["name"])
    return found


@pytest.mark.parametrize("name", STOPPED)
def test_evaluations_go_on(here: Path, name: str) -> None:
    """Images that are recorded are not segmented again; the figures are those of a whole run."""
    if name == "stopped_mosaic":
        need("skimage", "sklearn")
    folder, want = here / "evaluations" / name, expected_json("evaluations")[name]
    before, files = parts(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("[0-9]*.png")}
    ((old, finished),) = before.items()
    assert 0 < len(finished) < want["images"]
    run("evaluate", *command_line(folder), f"hydra.run.dir={folder}")
    results = json.loads((folder / "results.json").read_text())
    compare_results(results, want)
    after = parts(folder)
    assert after.pop(old) == finished
    (rest,) = after.values()
    assert len(rest) == want["images"] - len(finished) and not set(rest) & set(finished)
    for file, time in files.items():
        assert file.stat().st_mtime_ns == time, file
    assert len(rows(folder / "images.csv")) == want["images"]
    with np.load(folder / "confusion.npz", allow_pickle=False) as arrays:
        assert arrays["classes"].tolist() == list(want["per_class"])
        hits = 100 * arrays["confusion"].trace() / arrays["confusion"].sum()
    assert hits == pytest.approx(want["pixel_accuracy"], abs=0.5)
    if name == "stopped":
        kinds = {"pictures": 3, "label_maps": 4, "overlays": 4}
        assert {kind: len(list((folder / kind).glob("*.png"))) for kind in kinds} == kinds
        assert len(files) == 6


@pytest.mark.parametrize("name", ["stopped", "stopped_refined"])
def test_the_config_of_an_evaluation_repeats_it(here: Path, name: str) -> None:
    config = ("--config-path", str(here / "evaluations" / name / ".hydra"), "--config-name")
    run("evaluate", *config, "config", "hydra.run.dir=again")
    results = json.loads((here / "again" / "results.json").read_text())
    compare_results(results, expected_json("evaluations")[name])


def test_a_finished_evaluation_is_not_repeated(here: Path) -> None:
    folder = here / "evaluations" / "finished"
    want, before = json.loads((folder / "results.json").read_text()), parts(folder)
    given = command_line(folder, without=["compare_untrained"])
    run("evaluate", *given, f"hydra.run.dir={folder}")
    compare_results(json.loads((folder / "results.json").read_text()), want)
    assert parts(folder) == before
    assert rows(folder / "images.csv") == rows(HERE / "evaluations/finished/images.csv")


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("one", ["evaluations/finished"]),
        ("all", ["sweeps/evaluations", "evaluations/finished", "evaluations/stopped_mosaic"]),
    ],
)
def test_compare_prints_the_same_table(
    here: Path, name: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished, failed and unfinished evaluations, and those of a sweep."""
    run("compare", *folders, "--output", f"compared/{name}")
    stored = HERE / "expected"
    assert capsys.readouterr().out == (stored / f"compare_{name}.txt").read_text()
    for ending in ("md", "csv"):
        got = (here / "compared" / name / f"summary.{ending}").read_text()
        assert got == (stored / f"compare_{name}.{ending}").read_text()
    assert (here / "compared" / name / "report.html").stat().st_size > 1000


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_of_evaluations_goes_on(here: Path) -> None:
    """Finished jobs are not repeated, the failed ones are tried again, the table is the same."""
    folder = here / "sweeps" / "evaluations"
    before = {job: parts(folder / job) for job in "01"}
    given = command_line(folder / "0", without=["checkpoint", "pamr"])
    with pytest.raises(SystemExit) as stopped:
        run(
            "evaluate",
            "-m",
            *given,
            "checkpoint=runs/dense_ema,runs/missing",
            "pamr=false,true",
            f"hydra.sweep.dir={folder}",
        )
    assert stopped.value.code == 1
    assert {job: parts(folder / job) for job in "01"} == before
    stored = HERE / "sweeps" / "evaluations" / "summary.csv"
    assert (folder / "summary.csv").read_text() == stored.read_text()


def in_short(table: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    return {row["run"]: (row["optimizer.lr"], row[METRIC], row["state"]) for row in table}


def test_a_sweep_of_trainings_goes_on(here: Path) -> None:
    """A third value beside the two that are done."""
    folder = here / "sweeps" / "trainings"
    before = in_short(rows(folder / "sweep.csv"))
    given = command_line(folder / "0", without=["optimizer.lr"])
    values = "optimizer.lr=1e-3,1e-2,3e-3"
    run("train", "-m", *given, values, "resume=true", f"hydra.sweep.dir={folder}")
    after = in_short(rows(folder / "sweep.csv"))
    assert len(before) == 2 and after.keys() == {"0", "1", "2"}
    assert {name: after[name] for name in before} == before
    assert after["2"][2] == "ok"
    for name in before:
        old, new = (
            load_file(p / f"sweeps/trainings/{name}/projection.safetensors") for p in (HERE, here)
        )
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_search_goes_on(here: Path) -> None:
    """The study knows its first two trials; the third follows."""
    need("optuna")
    import optuna

    if int(optuna.__version__.split(".")[0]) < 5:
        pytest.skip("the study was written by Optuna 5")
    folder = here / "sweeps" / "search"
    before = in_short(rows(folder / "sweep.csv"))
    keys = ["optimizer.lr", "sweep", "sweep.n_trials", "sweep.storage", "sweep.trial"]
    given = command_line(folder / "0", without=keys)
    run("train", "-m", *given, "sweep=optuna", "sweep.n_trials=3", f"hydra.sweep.dir={folder}")
    after = in_short(rows(folder / "sweep.csv"))
    assert len(before) == 2 and len(after) == 3
    assert {name: after[name] for name in before} == before


# --- segmented pictures ---------------------------------------------------------------------------


def test_segmenting_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`resume=true` leaves out what was made with the same settings, and does the rest alike."""
    folder, stored = here / "segmented", HERE / "expected" / "segmented"
    done = {file: file.stat().st_mtime_ns for file in folder.glob("[01]*")}
    assert len(done) == 6
    run(
        "segment",
        "checkpoint=runs/dense_ema",
        "image=photos",
        "classes=[red,green,[blue,azure]]",
        "background=0.45",
        "short_side=64",
        "accelerator=cpu",
        "output=segmented",
        "resume=true",
        "hydra.run.dir=.",
    )
    assert "2 of 3 pictures were done before" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in done} == done
    for name in "012":
        got, want = (np.asarray(Image.open(p / f"{name}_labels.png")) for p in (folder, stored))
        assert (got != want).mean() < 0.01
        figures = [json.loads((p / f"{name}.json").read_text()) for p in (folder, stored)]
        assert figures[0].keys() - figures[1].keys() <= {"written_by", "picture"}
        assert figures[1].keys() <= figures[0].keys()
        assert figures[1]["settings"].items() <= figures[0]["settings"].items()
        shares = [{c["name"]: c["share"] for c in one["classes"]} for one in figures]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)
