"""`python -m talk2dino.app`: a web page to drop pictures on."""

from __future__ import annotations

import importlib.util

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.command import load_model, require
from talk2dino.errors import ConfigError


def require_all(config: DictConfig) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        ConfigError: no checkpoint, or Gradio is not installed.
    """
    require(config, "checkpoint")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the web page needs Gradio: pip install 'talk2dino[app]'")


def app(config: DictConfig) -> None:
    """Load the model and serve the page."""
    from talk2dino.web.page import Page, serve

    model = load_model(config)
    words = ", ".join(config.classes)
    page = Page(model, str(config.checkpoint), words, config.short_side).build()
    address = serve(page, config.host, config.port, config.max_upload_mb, config.browser)
    print(f"{address}  (Ctrl+C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    command.run("app", app, require_all)
