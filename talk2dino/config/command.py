"""What all commands share: compose, check, run, progress, and one line for an error."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from yaml import YAMLError  # type: ignore[import-untyped]

from talk2dino.config.checks import (
    check_given,
    check_targets,
    config_folder,
    config_groups,
    explain,
    use_current_names,
)
from talk2dino.config.quoting import quote_overrides
from talk2dino.config.schemas import SCHEMAS, register_schema
from talk2dino.encoders.devices import process_rank
from talk2dino.errors import Advance, ConfigError, ResultWarning, UserError
from talk2dino.files import refuse_foreign_run, write_json

_as_python_does = warnings.formatwarning
SWEEP_FILES = (
    *("multirun.yaml", "best.yaml", "sweep.md", "sweep.csv", "sweep.png"),
    *("summary.md", "summary.csv", "report.html"),
)
FAILED = "failed.json"  # in the run folder of a sweep's job that failed


def run(
    command: str,
    task: Callable[[DictConfig], Any],
    complete: Callable[[DictConfig], None] = lambda config: None,
) -> None:
    """Compose `<command>.yaml` from the command line and call `task` with the checked config.

    `complete` fills in the values that the config leaves to the data, before they are checked.
    A `UserError` is printed as one line and exits with status 2. In a sweep (-m) any error ends its
    own job only: a line is printed, `failed.json` in the job's run folder says why, the other jobs
    run, and the command exits with status 1 at its end.
    """
    register_schema(command)
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters that a class name has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.argv[1:] = quote_overrides(sys.argv[1:], SCHEMAS.get(command))
    except UserError as error:
        stop(str(error))

    def checked(config: DictConfig) -> Any:
        use_current_names(config)
        check_given(config)
        complete(config)
        check_targets(config)
        return task(config)

    def guarded(config: DictConfig) -> Any:
        quiet_libraries()
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        if sweep:
            failure_file().unlink(missing_ok=True)  # of an earlier try
        try:
            return checked(config)
        except Exception as error:
            message = user_message(error)
            if sweep:
                return note_failure(error, message)
            if message is None:
                raise
            stop(message)

    for group in config_groups():
        if f"{group}=null" in sys.argv[1:]:  # Hydra answers with a ValueError
            stop(f"{group}=null: to leave out a group, write ~{group}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=command)
    try:
        main(guarded)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        stop(explain(error, command))
    except UserError as error:  # of a sweeper
        stop(str(error))
    except OSError as error:  # of a run folder that cannot be made
        stop(os_message(error))


def require_common_folder() -> None:
    """Refuse to start under torchrun or srun without a run folder that all processes share.

    The default has a clock in its name, and two processes may read different times.
    """
    try:
        place = process_rank()
    except ConfigError as error:
        stop(str(error))
    named = any(a.startswith(("hydra.run.dir=", "--help", "--cfg")) for a in sys.argv[1:])
    if place.world_size == 1 or named:
        return
    if place.rank > 0:
        raise SystemExit(2)
    size = place.world_size
    stop(f"{size} processes would each name their own run folder; give hydra.run.dir=DIR")


class ExitStatus(Callback):
    """Guards a sweep's folder, and ends with status 1 if one of its jobs failed; of all commands.

    It stands first among the callbacks, so that at the end, in reverse order, it comes last.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse jobs that write over each other, and a folder with files of other origin."""
        folder = Path(config.hydra.sweep.dir)
        try:
            _require_own_outputs(config)
            refuse_foreign_run(folder, lambda: _is_sweep(folder), SWEEP_FILES)
        except ConfigError as error:
            stop(str(error))  # of other errors of a callback Hydra only warns

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Count the `failed.json` files, which jobs in other processes write as well."""
        failed = len(failures(Path(config.hydra.sweep.dir)))
        if failed:
            print(f"{failed} failed; see {FAILED} in their run folders", file=sys.stderr)
            raise SystemExit(1)


def _require_own_outputs(config: DictConfig) -> None:
    """Refuse a sweep whose jobs have one `output` (ConfigError)."""
    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    given = OverridesParser.create().parse_overrides(typed)
    swept = [one.key_or_group for one in given if one.is_sweep_override()]
    own = any(one.key_or_group == "output" and "${" in str(one.input_line) for one in given)
    if config.get("output") is not None and swept and "output" not in swept and not own:
        raise ConfigError(
            f"output: the jobs of a sweep over {swept[0]} would write over each other; name it by "
            "what differs, or by the job: 'output=out/${hydra:job.num}'"
        )


def _is_sweep(folder: Path) -> bool:
    """Whether Hydra has run a sweep in a folder: by its record, whole or not, or a job's."""
    record = folder / "multirun.yaml"
    start = record.read_bytes()[:6] if record.is_file() else b"?"
    return b"hydra:".startswith(start) or next(folder.rglob(".hydra"), None) is not None


def failures(sweep: Path) -> list[Path]:
    """The `failed.json` files of a sweep's run folders."""
    return sorted(sweep.rglob(FAILED))


def note_failure(error: Exception, message: str | None) -> None:
    """Print a sweep's failed job as one line and write `failed.json` into its run folder.

    The file holds `error`, the line, and `traceback` unless it is a `UserError`.
    """
    job = HydraConfig.get().job
    described = {"error": message or f"{type(error).__name__}: {error}"}
    if message is None:
        described["traceback"] = "".join(traceback.format_exception(error))
    write_json(failure_file(), described)
    line = " ".join(described["error"].split())
    print(f"error: run {job.num}: {line}", file=sys.stderr)


def folder_override(folder: Path) -> str:
    """The override by which the same command line finds this run folder again, sweep or not."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
    return f"hydra.run.dir={folder}"


def failure_file() -> Path:
    """Where the running job of a sweep notes its failure."""
    return Path(HydraConfig.get().runtime.output_dir) / FAILED


def user_message(error: Exception) -> str | None:
    """Return the line of a `UserError`; None for any other error.

    A loader worker or a spawned rank hands its error over as the text of a traceback.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return os_message(error)
    relayed = re.findall(r"^talk2dino\.errors\.\w+: (.*)$", str(error), re.M)
    if relayed:
        return str(relayed[-1])
    return str(error) if isinstance(error, UserError) else None


OTHER_PLACE = {
    errno.EEXIST: "; give a folder, or a name that is free",
    errno.ENOTDIR: "; give a folder, or a name that is free",
    errno.ENAMETOOLONG: "; give a shorter one",
}


def os_message(error: OSError) -> str:
    """One line of what the operating system refuses: the file, its key if typed, and the reason."""
    name = str(error.filename or "a file")
    typed = (given for given in sys.argv[1:] if given.partition("=")[2] == name)
    shown = next(typed, name)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return f"{shown}: {error.strerror or error}{OTHER_PLACE.get(error.errno or 0, '')}"


def quiet_libraries() -> None:
    """Keep advertisements and irrelevant warnings of libraries out of the terminal."""
    warnings.formatwarning = _one_line
    for name in ("sentence_transformers", "httpx", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what GDAL says comes as an error
    for message in (
        # Lightning 2.6 uses torch's pytree in a way that torch 2.14 warns about.
        "isinstance.treespec, LeafSpec",
        # A resumed run has moved its metrics.csv aside; its checkpoints are meant to be there.
        "exists and is not empty",
        # Memory-mapped features need no loader processes, and short runs log rarely.
        "does not have many workers",
        "smaller than the logging interval",
        # Every rank validates on everything, so its figures are already those of all ranks.
        "It is recommended to use .self.log.*sync_dist",
        # Evaluation counts into one confusion matrix and returns nothing per image.
        "predict returned None",
        # The validation loader's length is known; batches have their own sizes.
        "Trying to infer the `batch_size`",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our own warnings without the place in the code, which is not where the mistake is."""
    if issubclass(category, ResultWarning):
        return f"warning: {' '.join(str(message).split())}\n"
    return _as_python_does(message, category, filename, lineno, line)


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a node; a UserError from inside comes out as itself."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def stop(message: str) -> NoReturn:
    """Print one line for the user and end with status 2; a sweep ends as well."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def progress(what: str, visible: bool = True) -> Iterator[Advance]:
    """Gives `advance(done, total)`, which moves a bar on stderr if that is a terminal.

    A total of 0 is one that nobody knows.
    """
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    hidden = not (visible and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def require_output_folder(path: Path, key: str) -> Path:
    """Create a folder to write into; a ConfigError says why that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot create this folder ({error.strerror})") from error
    return path


def check_processes(config: DictConfig) -> None:
    """Stop where every process would do all of the work again: in a sweep, and without DDP."""
    node = config.trainer
    strategy = str(node.get("strategy", ""))
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and strategy.startswith("ddp") and "spawn" not in strategy:
        stop(
            f"trainer.strategy={strategy} inside a sweep (-m): each process would start the sweep "
            "anew; use one device per job, trainer.strategy=ddp_spawn, or torchrun"
        )
    place = process_rank()
    alone = strategy == "auto" and str(node.get("devices")) == "1" and node.get("num_nodes") == 1
    if alone and place.world_size > 1:
        if place.rank > 0:
            raise SystemExit(2)
        stop(
            f"{place.world_size} processes would each do all of the work; add trainer=ddp or "
            "trainer=slurm, on the CPU trainer=ddp_cpu trainer.strategy=ddp"
        )
