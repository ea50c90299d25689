"""Prompt templates: how a class name becomes sentences for the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from talk2dino.errors import ConfigError

Template = Callable[[str], str]
NAMES = ("plain", "photo", "simple7", "imagenet80")


def templates(name: str) -> Sequence[Template]:
    """Return a named set of templates.

    * `plain`: "a cat"; suits sentence encoders.
    * `photo`: "a photo of a cat."
    * `simple7`, `imagenet80`: the sets published with CLIP, as open_clip ships them.

    Raises:
        ConfigError: unknown name.
    """
    if name == "plain":
        return (lambda c: f"a {c}",)
    if name == "photo":
        return (lambda c: f"a photo of a {c}.",)
    if name in ("simple7", "imagenet80"):
        import open_clip

        published: Sequence[Template] = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "simple7"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return published
    raise ConfigError(f"templates={name!r} is unknown; choose one of {', '.join(NAMES)}")


def prompts(names: Sequence[str], template_set: str) -> list[list[str]]:
    """Return, for every class name, its sentences: [N][T]."""
    return [[template(name) for template in templates(template_set)] for name in names]
