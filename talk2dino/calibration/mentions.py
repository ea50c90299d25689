"""Which pictures of a reference have captions that speak of a word, by the text encoder alone.

Not by letters: captions say "man" and "girl" of what a class list calls a person.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.text.prompts import prompts
from talk2dino.features.store.reader import FeatureStore

# standard deviations above the mean of all pairs from which on a caption speaks of a word
SPREADS = 2.0
FEWEST = 100  # tokens that a word is compared with at least


def why_unknown(store: FeatureStore, text: TextEncoder) -> str:
    """Why the captions of a store cannot be compared with words; empty if they can.

    Args:
        store: whose captions.
        text: the encoder of the words.
    """
    if "embedding" not in store.captions:
        return "holds no embeddings of captions"
    if store.text is None or store.text.weights_sha256 != text.describe()["weights_sha256"]:
        return "its captions are of another text encoder"
    return ""


@torch.no_grad()
def closeness(
    store: FeatureStore,
    rows: NDArray[np.int64],
    words: Sequence[str],
    text: TextEncoder,
    templates: str | None = None,
) -> Tensor:
    """How close the captions of pictures come to words: `[V, P]` float32.

    The largest cosine of the text embeddings among a picture's captions; -1 for one without.

    Args:
        store: whose captions `text` has encoded, see `why_unknown`.
        rows: `[P]`, pictures of the store in rising order.
        words: V of them.
        text: text encoder.
        templates: prompts of a word, whose embeddings are averaged; None takes those that suit.
    """
    groups = prompts(words, templates or text.templates)
    encoded = text.encode([sentence for group in groups for sentence in group]).float().cpu()
    means = torch.stack([part.mean(0) for part in torch.split(encoded, [*map(len, groups)])])
    image = np.asarray(store.captions["image_row"][np.arange(len(store.captions))])
    captions = np.flatnonzero(np.isin(image, rows))
    place = torch.from_numpy(np.searchsorted(rows, image[captions]))
    said = torch.from_numpy(np.asarray(store.captions["embedding"][captions])).float()
    cosines = F.normalize(means, dim=-1) @ F.normalize(said, dim=-1).t()  # [V, captions]
    found = cosines.new_full((len(words), len(rows)), -1.0)
    return found.scatter_reduce(1, place.expand_as(cosines), cosines, "amax")


def unmentioned(close: Tensor, picture: Tensor) -> Tensor:
    """Which tokens are of pictures that do not speak of a word: `[V, R]` bool.

    A picture speaks of a word if its captions come closer to it than `SPREADS` standard deviations
    above the mean of all pairs, which needs no number of a particular text encoder. Of a word with
    fewer than `FEWEST` tokens left all count.

    Args:
        close: `[V, P]`, see `closeness`.
        picture: `[R]` int64, the picture of every token.

    Examples:
        >>> import torch
        >>> from talk2dino.calibration.mentions import unmentioned
        >>> close = torch.full((2, 400), 0.1)
        >>> close[0, :3] = 0.9  # three pictures speak of the first word
        >>> unmentioned(close, torch.arange(400)).sum(1)
        tensor([397, 400])
    """
    told = close > -1  # pictures with captions
    values = close[told]
    limit = values.mean() + SPREADS * values.std(unbiased=False)
    kept = (close <= limit)[:, picture]
    return kept | (kept.sum(1, keepdim=True) < FEWEST)
