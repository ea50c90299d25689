"""`python -m talk2dino.app`: a web page to drop pictures on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.model_and_classes import class_words, load_model, require
from talk2dino.errors import ConfigError, require_extra, say
from talk2dino.inference.class_embeddings import ClassEmbeddings


def require_all(config: DictConfig) -> None:
    """Refuse to begin without a checkpoint or without Gradio (ConfigError)."""
    require(config, "checkpoint")
    require_extra("app", "the web page")


def page_words(classes: Mapping[str, Sequence[str]]) -> str:
    """Classes as a visitor would type them; a name that is none of its words is lost and said."""
    for name, words in classes.items():
        check_typeable(words)
        if name not in words:
            say(f"classes: the page calls {name!r} by its first word, {words[0]!r}")
    return ", ".join("; ".join(words) for words in classes.values())


def check_typeable(words: Iterable[str]) -> None:
    """Refuse words that the page's line of text would part (ConfigError)."""
    parted = next((word for word in words if set(word) & set(",;")), None)
    if parted is not None:
        raise ConfigError(
            f"classes: {parted!r} has a comma or semicolon, which part words on the page; give the "
            "class another name"
        )


def app(config: DictConfig) -> None:
    """Load the model and serve the page."""
    from talk2dino.web.page import Page, show_page

    classes = class_words(config.classes) if config.classes else {}
    model = load_model(config, classes=classes)
    if isinstance(classes, ClassEmbeddings):
        kept = model.embed_classes(classes)  # refuses those of another checkpoint
        check_typeable(kept.words.names)
        words = ", ".join(kept.words.names)
    else:
        kept = None
        words = page_words(classes)
        model.encode_text([])  # builds the text encoder: its errors come before the page
    page = Page(
        model, str(config.checkpoint), words, config.short_side, kept, config.calibration
    ).build()
    address = show_page(page, config.host, config.port, config.max_upload_mb, config.browser)
    print(f"{address}  (Ctrl+C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    command.run("app", app, require_all)
