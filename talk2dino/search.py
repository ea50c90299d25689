"""`python -m talk2dino.search`: the pictures of a feature store in which words are found."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from talk2dino.alignment.checkpoint import read_checkpoint
from talk2dino.alignment.projection import Projection
from talk2dino.calibration.calibration import find_calibration
from talk2dino.calibration.reference import require_encoder
from talk2dino.config import command
from talk2dino.config.model_and_classes import check_words, class_words, load_model, require
from talk2dino.datasets.benchmarks.classes import read_classes, typed_classes
from talk2dino.errors import CheckpointError, ConfigError, DataError
from talk2dino.features.store.reader import FeatureStore
from talk2dino.files import read_json, read_text, user_path
from talk2dino.finding.found_files import JSON, PAGE, Written, refuse_foreign_results, write_found
from talk2dino.finding.recall import check_recall, recall
from talk2dino.finding.scan import PATCHES, Found, searched_field
from talk2dino.inference.class_embeddings import ClassEmbeddings, is_file

NO_PLACE = "The store holds pooled features: pictures are found, places are not."


def require_all(config: DictConfig) -> None:
    """Refuse to begin without checkpoint, store or query (ConfigError)."""
    absent = [key for key in ("store", "query") if config[key] is None]
    if config.recall and "query" in absent:
        absent.remove("query")
    if config.checkpoint is None:
        require(config, "checkpoint", *absent)
    if absent:
        given = " ".join(f"{key}=…" for key in absent)
        raise ConfigError(
            f"{given} not given; store=DIR is a feature store, query='red bicycle' what to look for"
        )


def search(config: DictConfig) -> None:
    """Find the pictures and write both files."""
    queries = query_words(config.query) if config.query is not None else None
    if queries is not None:
        check_words(config, queries)
    store = FeatureStore(config.store)
    field = searched_field(store)
    images = None if config.images is None else user_path(config.images)
    if images is not None and not images.is_dir():
        raise DataError(
            f"images={config.images}: no such folder; give that of the pictures, or of their tars"
        )
    projection = refuse_other_store(store, field, config)
    similarity = command.build(config.val_similarity).eval() if config.recall else None
    if similarity is not None:
        check_recall(store, projection, similarity)
    output = command.require_output_folder(user_path(config.output), "output")
    if not config.overwrite:
        refuse_foreign_results(output)
    model = load_model(config, classes=queries)
    if store.vision is not None:
        model.vision.refuse_other_layers(store.vision.spec, f"store={config.store}")
    calibration = model.calibration if field == PATCHES else None
    facts: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "store": str(config.store),
        "images": len(store.images),
        "field": field,
        "calibration": calibration and calibration.describe(),
        "best": config.best if field == PATCHES else 1,
        "note": "" if field == PATCHES else NO_PLACE,
        "recall": {},
    }
    if similarity is not None:
        require_encoder(store, model.vision, "extract with that")
        with command.progress("recall") as advance:
            facts["recall"] = recall(store, model.projection, similarity, config.best, advance)
    with command.progress("pictures") as advance:
        found: Iterator[Found] = iter(())
        total = 0
        if queries is not None:
            options = (config.top, config.best, config.templates)
            found = model.search(store, queries, *options, advance=advance)
            total = len(list(queries)) * min(config.top, len(store.images))
        written = write_found(found, output, facts, images, advance, total)
    report(facts, written, output, images)


def query_words(given: Any) -> Mapping[str, tuple[str, ...]] | ClassEmbeddings:
    """Queries as `Talk2DINO.search` takes them; a text is one query, whatever commas it has.

    Raises:
        ConfigError: no query, an empty one, or one twice.
        DataError: a file that cannot be read.
    """
    if not isinstance(given, str) or given.lstrip()[:1] in ("[", "{") or is_file(given.strip()):
        return class_words(given, key="query")
    text = given.strip()
    suffix, file = Path(text).suffix.lower(), user_path(text)
    if suffix not in (".txt", ".json"):
        return class_words([given], key="query")
    if not file.is_file():
        raise DataError(f"query={text}: no such file; to look for these words: query=['{text}']")
    if suffix == ".json":
        listed = read_json(file, object, "a list of queries")
        if isinstance(listed, list) and not any(isinstance(one, dict) for one in listed):
            return typed_classes(listed, f"query={text}")  # "background" is a word like any other
        named = read_classes(text, "query").classes  # of a benchmark, or with synonyms
        return {spec.name: spec.synonyms for spec in named}
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise DataError(f"query={text}: is empty; write a query on each line")
    return typed_classes(lines, f"query={text}")


def refuse_other_store(store: FeatureStore, field: str, config: DictConfig) -> Projection:
    """Compare what the store and the checkpoint say of themselves, before encoders are built.

    Returns:
        The checkpoint's projection.

    Raises:
        CheckpointError: another vision encoder, or another width; or no checkpoint.
    """
    checkpoint = read_checkpoint(config.checkpoint)
    find_calibration(config.calibration, config.checkpoint)
    spec: Any = config.vision or checkpoint.vision or {}
    theirs = store.vision.spec if store.vision is not None else {}
    names = [str(one.get("name")) for one in (theirs, spec)]
    layers = [str(one.get("layers") or "null") for one in (theirs, spec)]
    if theirs and spec and names[0] == names[1] and layers[0] != layers[1]:
        raise CheckpointError(
            f"store={config.store}: made of the tokens of vision.layers={layers[0]}, the "
            f"checkpoint of {layers[1]}; extract with the checkpoint's"
        )
    width = store.images[field].shape[-1]
    if checkpoint.projection.vision_dim != width:
        raise CheckpointError(
            f"store={config.store}: holds features of width {width}, the checkpoint is for width "
            f"{checkpoint.projection.vision_dim}; extract with its encoder, {names[1]}"
        )
    if theirs and spec and names[0] != names[1]:
        raise CheckpointError(
            f"store={config.store}: its features are of {names[0]}, not of this checkpoint's "
            f"{names[1]}; extract with that"
        )
    return checkpoint.projection


def report(facts: Mapping[str, Any], written: Written, output: Path, images: Path | None) -> None:
    """Print the first results, the recalls, what could not be read, and where the files are."""
    console = Console(markup=False, emoji=False)
    table = Table()
    for name in ("query", "picture", "score", "place"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    for query, entries in written.first.items():
        for number, entry in enumerate(entries):
            name = entry["file_name"] or f"row {entry['row']}"
            place = entry["square" if images is None else "box"]  # one kind of pixels in a table
            shown = "" if place is None else ", ".join(map(str, place))
            table.add_row(query if not number else "", name, f"{entry['score']:.3f}", shown)
    if written.queries:
        console.print(table)
    for name, figures in facts["recall"].items():
        shown = "  ".join(f"@{k} {figures[f'text_to_image/recall@{k}']:.1f}" for k in (1, 5, 10))
        print(f"recall, {name}: {shown}")
    if facts["note"]:
        print(facts["note"])
    elif images is None and written.queries:
        print("places are in pixels of the encoded square; images=DIR gives those of the pictures")
    print(f"results: {output / JSON}\npage: {output / PAGE}")
    if written.missing:
        print(f"{len(written.missing)} pictures could not be read:", file=sys.stderr)
        lines = [f"  {name}: {reason}" for name, reason in written.missing.items()]
        print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    command.run("search", search, require_all)
