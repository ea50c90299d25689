"""The web page: which parts it has, and what each of them sets off (Gradio)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from html import escape
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from talk2dino.calibration.calibration import AUTO
from talk2dino.errors import ConfigError, DataError, UserError, listening
from talk2dino.inference.class_embeddings import ClassEmbeddings
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation.windows import SHORT_SIDE
from talk2dino.web.examples import PaintedExample, to_paint_on
from talk2dino.web.session import (
    IDLE_SECONDS,
    Request,
    View,
    Views,
    add_example,
    annotation_files,
    answer,
    areas,
    open_picture,
    python_call,
    return_memory,
    scores_at,
)

KEPT = 8  # folders of annotations, whose files Gradio copies at once


class Page:
    """Drop a picture, name classes, look.

    Args:
        model: segments.
        checkpoint: as the visitor would write it in Python.
        words: classes to begin with.
        short_side: working size in pixels.
        kept: class embeddings; a visitor then chooses among their names.
        calibration: as the visitor would write it in Python.
    """

    def __init__(
        self,
        model: Talk2DINO,
        checkpoint: str,
        words: str = "",
        short_side: int = SHORT_SIDE,
        kept: ClassEmbeddings | None = None,
        calibration: str | None = AUTO,
    ) -> None:
        self.model, self.checkpoint, self.kept = model, checkpoint, kept
        self.calibration = calibration
        self.words, self.short_side = words, short_side
        self.folder = TemporaryDirectory()  # of annotations to be fetched
        self.made: deque[Path] = deque()  # folders in it, the latest last
        self.views = Views()

    def build(self) -> gr.Blocks:
        """Lay the page out and connect its parts."""
        # None of the events is an API of its own: they need a visitor's picture.
        quiet: Any = {"api_visibility": "private"}
        start = round(self.model.background, 3) if self.model.calibration else 0.5
        often, old = int(IDLE_SECONDS // 6), int(IDLE_SECONDS)  # when files are removed
        with gr.Blocks(
            title="talk2dino", analytics_enabled=False, delete_cache=(often, old)
        ) as page:
            gr.Markdown(
                "# talk2dino\nDrop a picture, name what to look for, and see where it is. "
                "Everything stays on this machine."
            )
            with gr.Row():
                with gr.Column():
                    picture = gr.Image(
                        type="filepath", image_mode=None, sources=["upload", "clipboard"],
                        label="Picture", elem_id="picture", height=300,
                    )  # fmt: skip
                    # Gradio would open the file itself, and fail where the visitor cannot see it.
                    picture.preprocess = uploaded_file  # type: ignore[assignment, method-assign]
                    words = gr.Textbox(
                        self.words, label="Classes", elem_id="words", max_lines=3,
                        placeholder="cat, sofa; couch, dark leaves",
                        info="separated by commas; synonyms by semicolons; Enter to look",
                    )  # fmt: skip
                    go = gr.Button("Segment", variant="primary", elem_id="go")
                    background = gr.Checkbox(
                        label="Background: pixels that no class fits", elem_id="background"
                    )
                    threshold = gr.Slider(
                        0.25, 0.75, start, step=0.005, label="Background threshold",
                        elem_id="threshold", visible=False,
                    )  # fmt: skip
                    pamr = gr.Checkbox(True, label="Refine the edges (PAMR)", elem_id="pamr")
                with gr.Column(scale=2):
                    overlay = gr.Image(
                        label="Segmentation: click a pixel for its scores", elem_id="overlay",
                        interactive=False, format="png", buttons=["download", "fullscreen"],
                    )  # fmt: skip
                    shown = gr.CheckboxGroup([], label="Show", elem_id="shown", visible=False)
                    with gr.Row():
                        instances = gr.Checkbox(
                            label="Connected areas one by one", elem_id="instances"
                        )
                        annotate = gr.Button("Annotations as files", elem_id="annotate")
                    files = gr.File(
                        label="Annotations", elem_id="files", file_count="multiple",
                        interactive=False, visible=False,
                    )  # fmt: skip
                    with gr.Row():
                        shares = gr.HTML(elem_id="shares")
                        scores = gr.HTML(elem_id="scores")
                    code = gr.Code(language="python", label="The same in Python", elem_id="code")
            with gr.Accordion(
                "Show a class instead of saying it: paint on the picture", open=False,
                elem_id="by-example", visible=self.kept is None,
            ), gr.Row():  # fmt: skip
                with gr.Column(scale=2):
                    editor = gr.ImageEditor(
                        label="Paint over what it looks like", elem_id="editor", height=420,
                        sources=(), transforms=(), layers=False, buttons=[], format="png",
                        brush=gr.Brush(colors=["rgb(230, 30, 90)"], color_mode="fixed"),
                    )  # fmt: skip
                    editor.preprocess = painted_files  # type: ignore[assignment, method-assign]
                with gr.Column():
                    name = gr.Textbox(
                        label="Name of the class", elem_id="name", max_lines=1,
                        placeholder="crack", info="one of the words above: both count",
                    )  # fmt: skip
                    add = gr.Button("Use as an example", elem_id="add")
                    examples = gr.CheckboxGroup(
                        [], label="Examples in use", elem_id="examples", visible=False,
                        info="unchecked ones are forgotten when another is added",
                    )  # fmt: skip
            request = [words, background, threshold, pamr, examples]
            results = [overlay, shown, shares, code, files]
            picture.upload(_user_errors(self.open), picture, editor, **quiet).success(
                _user_errors(self.segment), request, results, **quiet
            )
            picture.clear(self.forget, None, [*results, scores, editor], **quiet)
            painting = [editor, name, examples]
            add.click(
                _user_errors(self.add_example), painting, painting, show_progress="hidden", **quiet
            ).success(_user_errors(self.segment), request, results, **quiet)
            examples.input(_user_errors(self.segment), request, results, **quiet)
            for event in (go.click, words.submit, pamr.change, background.change):
                event(_user_errors(self.segment), request, results, **quiet)
            threshold.change(
                _user_errors(self.segment, warn=False), request, results,
                trigger_mode="always_last", show_progress="hidden", **quiet,
            )  # fmt: skip
            background.change(lambda on: gr.update(visible=on), background, threshold, **quiet)
            shown.input(
                _user_errors(self.show), shown, [overlay, code], show_progress="hidden", **quiet
            )
            annotate.click(_user_errors(self.annotate), instances, files, **quiet)
            overlay.select(self.click, None, scores, show_progress="hidden", **quiet)
            page.unload(self.leave)
        return page  # type: ignore[no-any-return]

    def open(self, file: str | None, visitor: gr.Request) -> Any:
        """An upload: run the encoder; gives the picture to paint on."""
        examples = self.take_away(visitor)
        remove_broken_uploads()
        if not file:
            return None
        view = open_picture(self.model, Path(file), self.short_side)
        self.views.keep(_name(visitor), replace(view, examples=examples))
        return None if view.picture is None else to_paint_on(view.picture.pixels)

    def segment(
        self,
        words: str,
        background: bool,
        threshold: float,
        pamr: bool,
        chosen: Sequence[str],
        visitor: gr.Request,
    ) -> Sequence[Any]:
        """New request: overlay, switches, shares and code, no files; nothing without a class."""
        if not words.strip() and not chosen:
            return [gr.skip()] * 5
        view = self._view(visitor)
        examples = tuple(one for one in view.examples if one.label in chosen)
        request = Request(words, background, threshold, pamr, examples)
        view = answer(self.model, view, request, self.kept)
        self.views.keep(_name(visitor), view)
        assert view.result is not None
        names = view.result.classes
        switches = gr.update(choices=names, value=names, visible=True)
        code = python_call(self.checkpoint, view, kept=self.kept, calibration=self.calibration)
        table = html_table("Share of the picture", areas(view.result))
        return view.result.overlay(), switches, table, code, gr.update(visible=False)

    def add_example(
        self, layers: Sequence[Path], name: str, chosen: Sequence[str], visitor: gr.Request
    ) -> Sequence[Any]:
        """What was painted: the picture without it, no name, and the examples in use."""
        view = self._view(visitor)
        kept = [one for one in view.examples if one.label in chosen]
        view = add_example(self.model, view, name, layers, kept)
        self.views.keep(_name(visitor), view)
        assert view.picture is not None
        labels = [one.label for one in view.examples]
        boxes = gr.update(choices=labels, value=labels, visible=True)
        return to_paint_on(view.picture.pixels), "", boxes

    def _view(self, visitor: gr.Request) -> View:
        """A visitor's view with a picture."""
        view = self.views.of(_name(visitor))
        if view is None or view.picture is None:
            raise DataError("Drop a picture first (one that lay here for long is forgotten)")
        return view

    def show(self, shown: Sequence[str], visitor: gr.Request) -> Sequence[Any]:
        """Switches: the overlay without the classes that are off."""
        view = self.views.of(_name(visitor))
        if view is None or view.result is None:
            return [gr.skip()] * 2
        hidden = [name for name in view.result.classes if name not in shown]
        return view.result.overlay(hide=hidden), python_call(
            self.checkpoint, view, hidden, self.kept, self.calibration
        )

    def annotate(self, instances: bool, visitor: gr.Request) -> Any:
        """The button: a file per format of annotations."""
        view = self._view(visitor)
        if view.result is None:
            raise DataError("Name a class and look for it first")
        folder = Path(mkdtemp(dir=self.folder.name))
        try:
            made = [str(path) for path in annotation_files(view, folder, instances)]
        finally:
            self.made.append(folder)
            while len(self.made) > KEPT:
                rmtree(self.made.popleft(), ignore_errors=True)
        return gr.update(value=made, visible=True)

    def click(self, event: gr.SelectData, visitor: gr.Request) -> str:
        """A click on the overlay: the scores there."""
        view = self.views.of(_name(visitor))
        if view is None or view.result is None:
            return ""
        column, row = (int(place) for place in event.index)
        return html_table(f"Scores at ({column}, {row})", scores_at(view.result, row, column))

    def forget(self, visitor: gr.Request) -> Sequence[Any]:
        """The picture was taken away; the examples stay."""
        self.take_away(visitor)
        hidden = gr.update(visible=False)
        return None, gr.update(choices=[], visible=False), "", "", hidden, "", None

    def take_away(self, visitor: gr.Request) -> tuple[PaintedExample, ...]:
        """Drop a visitor's picture and its result; gives the examples."""
        view = self.views.of(_name(visitor))
        if view is None or not view.examples:
            self.leave(visitor)
            return ()
        self.views.keep(_name(visitor), View(examples=view.examples))
        return view.examples

    def leave(self, visitor: gr.Request) -> None:
        """The page was closed."""
        self.views.forget(_name(visitor))
        return_memory()


def _name(visitor: gr.Request) -> str:
    """What tells open pages apart; the visitor's browser draws it at random."""
    return str(visitor.session_hash)


def remove_broken_uploads(seconds: float = IDLE_SECONDS) -> None:
    """Remove what uploads that broke off left in Gradio's folder, which forgets such files.

    Args:
        seconds: since a part grew for the last time.
    """
    for part in Path(get_upload_folder()).glob("tmp*"):  # a whole upload is moved into a folder
        with suppress(OSError):
            if part.is_file() and time.time() - part.stat().st_mtime > seconds:
                part.unlink()


def uploaded_file(upload: Any) -> str | None:
    """The file that an uploaded picture was saved as."""
    return None if upload is None else upload.path


def painted_files(edited: Any) -> list[Path]:
    """The files that an editor's strokes were saved as."""
    return [] if edited is None else [Path(layer.path) for layer in edited.layers]


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """HTML of rows of name and figure; a visitor's words stay words."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align: right'>{escape(figure)}</td></tr>"
        for name, figure in rows
    )
    return f"<table style='width: 100%'><caption>{escape(title)}</caption>{cells}</table>"


def _user_errors(step: Callable[..., Any], warn: bool = True) -> Callable[..., Any]:
    """Errors of the visitor's making become a message on the page, as does what is said."""

    @wraps(step)
    def guarded(*arguments: Any) -> Any:
        with listening() as said:
            try:
                return step(*arguments)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error
            finally:
                for text in said if warn else ():
                    gr.Warning(text)

    return guarded


def show_page(
    page: gr.Blocks, host: str, port: int | None, max_upload_mb: float, browser: bool = False
) -> str:
    """Begin to answer requests; no share link, no analytics, fonts of the visitor's machine.

    Args:
        page: from `Page.build`.
        host: address to bind to; 127.0.0.1 is this machine alone.
        port: None takes the first free one from 7860.
        max_upload_mb: larger files are refused.
        browser: open the page in a browser.

    Returns:
        The page's address; `page.block_thread()` waits until it is interrupted.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=2).launch(
            server_name=host,
            server_port=port,
            max_file_size=int(max_upload_mb * 1024 * 1024),
            inbrowser=browser,
            prevent_thread_lock=True,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
            share=False,
            ssr_mode=False,
            quiet=True,
        )
    except OSError as error:
        raise ConfigError(f"port={port}: cannot be opened on {host} ({error})") from error
    return str(address)
