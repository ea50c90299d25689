"""Prompt templates: how a class name becomes sentences for the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from talk2dino.errors import ConfigError

Template = Callable[[str], str]

_SUBSET = (
    "itap of a {}.",
    "a bad photo of a {}.",  # the one word that differs from CLIP's own seven ("of the")
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
_SETS: dict[str, tuple[str, ...]] = {
    "plain": ("a {}",),
    "identity": ("{}",),
    "photo": ("a photo of a {}.",),
    "simple": ("a photo of a {}.",),
    "plural": ("a photo of {}s.",),
    "subset": _SUBSET,
    "custom": (*_SUBSET, "a photo of many {}.", "a photo of {}s."),
    "maskclip": (
        "there is a {} in the scene.",
        "there is the {} in the scene.",
        "this is a {} in the scene.",
        "this is the {} in the scene.",
        "this is one {} in the scene.",
    ),
}
_FROM_OPEN_CLIP = ("simple7", "imagenet80", "full")
NAMES = (*_SETS, *_FROM_OPEN_CLIP)


def templates(name: str) -> Sequence[Template]:
    """Return a named set of templates; `a+b` joins two sets.

    * `plain` ("a cat"): suits sentence encoders. `identity`: the bare name.
    * `simple7`, `imagenet80`: the sets published with CLIP, as open_clip ships them.
    * Sets of the original (`datasets/imagenet_template.py`, which it took from TCL): `full` (the
      same as `imagenet80`), `subset` (7), `simple` (the same as `photo`), `plural`, `identity`,
      `maskclip` (5), `full+maskclip`, `subset+maskclip`, `custom` (9).

    Args:
        name: one of `NAMES`, or several joined by `+`.

    Raises:
        ConfigError: unknown name.
    """
    return [template for part in name.split("+") for template in _named(part)]


def prompts(names: Sequence[str], template_set: str) -> list[list[str]]:
    """Return, for every class name, its sentences: N lists of T."""
    patterns = templates(template_set)
    return [[template(name) for template in patterns] for name in names]


def _named(name: str) -> Sequence[Template]:
    if name in _SETS:
        return [pattern.format for pattern in _SETS[name]]
    if name in _FROM_OPEN_CLIP:
        import open_clip

        published: Sequence[Template] = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "simple7"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return published
    raise ConfigError(
        f"templates={name!r} is unknown; choose one of {', '.join(NAMES)}, or join some by +"
    )
