"""`python -m talk2dino.segment`: pictures and class names into label maps and overlays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from talk2dino.alignment.checkpoint import checkpoint_digest
from talk2dino.annotations.base import Options
from talk2dino.annotations.data_sets import check_formats, refuse_changed
from talk2dino.calibration.calibration import find_calibration
from talk2dino.config import command
from talk2dino.config.model_and_classes import (
    build_refinement,
    check_words,
    listed,
    named_classes,
    open_vocabulary,
    require_classes,
    shares_table,
)
from talk2dino.datasets.benchmarks.classes import BACKGROUND
from talk2dino.errors import DataError, say
from talk2dino.evaluation.settings import deciding
from talk2dino.files import file_digest, user_path
from talk2dino.inference.class_embeddings import ClassEmbeddings, NamedClasses
from talk2dino.inference.process_shares import (
    Share,
    annotations_folder,
    refuse_no_folder,
    write_annotations,
)
from talk2dino.inference.result_files import (
    Job,
    plan,
    refuse_foreign_outputs,
    refuse_heatmap_collisions,
    write,
)
from talk2dino.inference.vocabulary import OpenVocabulary, exemplars_of
from talk2dino.segmentation.memory import GB, LARGE


def segment(config: DictConfig) -> None:
    """Segment the picture, or all pictures of the folder or pattern, that the config names."""
    classes = named_classes(config)
    words, shown = _words_and_digests(classes)
    check_words(config, classes)
    formats = listed(config.formats)
    options = Options(
        config.instances,
        config.minimum_area,
        config.tolerance,
        config.polygons,
        config.image_root_url,
    )
    check_formats(formats)
    options.refuse_idle(formats)
    jobs = plan(str(config.image), str(config.output), config.get("subfolders", False), formats)
    for parent in sorted({job.overlay.parent for job in jobs}):
        command.require_output_folder(parent, "output")
    folder = annotations_folder(jobs, str(config.image))
    refuse_no_folder(folder, formats, jobs)
    calibration = find_calibration(config.calibration, config.checkpoint)
    build_refinement(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    settings = deciding(plain, "segment")  # kept with each result, for resume=true
    settings["weights"] = checkpoint_digest(config.checkpoint)
    if calibration is not None:
        settings["calibration"] = calibration.digest
    if isinstance(classes, ClassEmbeddings):
        settings["class_embeddings"] = file_digest(user_path(classes.origin))
    elif isinstance(config.classes, str) and user_path(config.classes).is_file():
        settings["words"] = {
            name: list(given) for name, given in words.items()
        }  # a file may change
    if shown:
        settings["exemplars"] = shown
    maps = list(classes) if config.heatmaps else []
    refuse_heatmap_collisions(jobs, maps, str(config.image))
    cut = options.cut if formats else None
    share = Share.of(jobs, settings, maps, formats, options)
    left = [job for job in share.mine if not config.resume or job.lacks(settings, maps, cut)]
    if not config.overwrite:
        refuse_foreign_outputs(left, maps)
        refuse_changed(folder, formats)
    share.begin()
    if len(left) < len(share.mine):
        print(f"{len(share.mine) - len(left)} of {len(share.mine)} pictures were done before")
    again = [job for job in left if config.resume and job.figures.is_file()]
    if again:
        why = f"{again[0].name}: {again[0].lacks(settings, maps, cut)}"
        print(f"{len(again)} pictures are done again, for their results are others ({why})")
    broken: dict[Job, str] = {}
    if left:
        vocabulary = open_vocabulary(config, classes, config.short_side)
        broken = _segment(
            left, vocabulary, settings, bool(config.heatmaps), options if formats else None, share
        )
    with share.finished(broken, lambda job: not job.lacks(settings, maps, cut)) as found:
        if not share.alone:
            who = f"rank {share.place.rank} of {share.place.world_size}"
            then = "the last rank to finish gathers" if found is None else "all ranks are done"
            print(f"{who}: {len(left) - len(broken)} pictures segmented; {then}")
        if found is None:
            return
        done = [job for job in jobs if job not in found]
        if formats and done:
            made = write_annotations(done, words, folder, formats, options, config.overwrite)
            print(f"annotations: {', '.join(map(str, made))}")
            if "labelstudio" in formats and options.image_root_url == Options().image_root_url:
                where = f"{options.image_root_url}NAME"
                print(f"Label Studio fetches pictures from {where}, see image_root_url= (--help)")
    if found:
        tried = len(left) if share.alone else len(jobs)
        print(f"{len(found)} of {tried} pictures could not be read:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in found.values()), file=sys.stderr)
        raise SystemExit(1)


def _words_and_digests(
    classes: NamedClasses,
) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """The words of each class, and the digests of the exemplars of those that are shown."""
    if isinstance(classes, ClassEmbeddings):  # a digest of the file says what is in it
        return classes.words.synonyms, {}
    words = {n: tuple(e for e in given if isinstance(e, str)) for n, given in classes.items()}
    return words, {n: [e.digest for e in given] for n, given in exemplars_of(classes).items()}


def _segment(
    jobs: Sequence[Job],
    vocabulary: OpenVocabulary,
    settings: dict[str, Any],
    heatmaps: bool,
    options: Options | None,
    share: Share,
) -> dict[Job, str]:
    """Write every result; gives the broken pictures of a folder with what is wrong."""
    console, single = Console(markup=False, emoji=False), len(share.jobs) == 1
    totals: dict[str, Totals] = {}
    broken: dict[Job, str] = {}
    said = LARGE
    for job in track(jobs, "segment", console=console, disable=single or share.place.rank > 0):
        needed = vocabulary.memory(job.image)
        if needed is not None and needed.total > said:
            said = needed.total
            console.print(
                f"{job.image.name}: takes about {said / GB:.1f} GB of working memory",
                highlight=False,
            )
        try:
            with share.reading(job):
                result = vocabulary(job.image)
        except DataError as error:
            if single:
                raise
            broken[job] = str(error)
            continue
        write(result, job, heatmaps, settings, options)
        for name, part in result.areas().items():
            totals[name] = totals.get(name, Totals()).and_one(part)
    if totals and share.alone:
        shares = {name: one.shares / one.pictures for name, one in totals.items()}
        seen = {name: one.seen for name, one in totals.items()}
        console.print(shares_table(shares) if single else shares_table(shares, seen))
        if vocabulary.threshold is not None and shares[BACKGROUND] > EMPTY:
            say(
                f"nearly all is background, which no class outscores at {vocabulary.threshold}; "
                "lower it (background=0.5, for instance), or calibrate the checkpoint: "
                "talk2dino.calibrate"
            )
        print(f"overlay: {jobs[0].overlay if single else jobs[0].folder}")
        first = jobs[0]
        files = (first.labels, first.figures.name)
        if not single:
            files = (first.folder / "…_labels.png", "….json")
        print(f"label map, areas: {files[0]}, {files[1]}")
    return broken


EMPTY = 0.995  # share of the background in all pictures that is said


class Totals(NamedTuple):
    """Of a class: the sum of its shares, pictures with some of it, and all pictures."""

    shares: float = 0.0
    seen: int = 0
    pictures: int = 0

    def and_one(self, share: float) -> Totals:
        """With one more picture."""
        return Totals(self.shares + share, self.seen + (share > 0), self.pictures + 1)


if __name__ == "__main__":
    command.run("segment", segment, lambda config: require_classes(config, "checkpoint", "image"))
