"""One pass over a feature store: the scores of its patches, and the best pictures of every query.

Scores are cosines minus a query's offset, if there is a calibration; `sigmoid` of them is what
`segment` shows. Letters: Q queries, N text rows (a query may have synonyms), I images, P patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.errors import Advance, StoreError, check_number
from talk2dino.features.store.reader import FeatureStore, Field
from talk2dino.segmentation.scores import merge_synonyms, split_offsets

PATCHES = "patch_tokens"
BEST = 8  # patches of a picture whose mean score counts
# what is compared, the best first: places, or whole pictures seen by each head or by all of them
FIELDS = (PATCHES, "disentangled_self_attn", "avg_self_attn_out")
BLOCK = 1 << 23  # bytes of a block: one matrix product
SCORES = 1 << 21  # of a block at most, all text rows together: they stay in the cache


@dataclass(frozen=True, eq=False)
class Scan:
    """Text rows settled for a store; iterating reads the store once.

    Attributes:
        store: the features.
        rows: `[N, D]` unit text rows, or with offsets `[N, D + 1]`, on the device that computes.
        row_queries: `[N]` int64, the query of every row.
        projection: whose image side the patches pass first, if it has one.
    """

    store: FeatureStore
    rows: Tensor = field(repr=False)
    row_queries: Tensor
    projection: Projection | None = None

    @property
    def field(self) -> Field:
        """What is compared."""
        return self.store.images[searched_field(self.store)]

    @property
    def queries(self) -> int:
        """Q."""
        return int(self.row_queries.max()) + 1

    def only(self, query: int) -> Scan:
        """That of one query."""
        own = (self.row_queries == query).to(self.rows.device)
        return replace(self, rows=self.rows[own], row_queries=torch.zeros(int(own.sum())).long())

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The first image of a block and the scores of the block, `[Q, I, P]` float32.

        Pictures that are stored as heads or as a whole have P = heads or 1.

        Raises:
            StoreError: a feature that is not finite, with its row.
        """
        stored = self.field
        places = int(np.prod(stored.shape[1:-1]))
        images = min(BLOCK // stored.row_bytes, SCORES // (places * len(self.rows)))
        for first, tokens in stored.blocks(max(1, images)):
            yield first, self.scores(tokens, first)

    @torch.no_grad()
    def scores(self, tokens: NDArray[Any], first: int = 0) -> Tensor:
        """Scores of some images, `[I, P, D]`, `[I, H, D]` or `[I, D]`: `[Q, I, P]`.

        Args:
            tokens: rows of the field.
            first: row of the first of them, for the error.
        """
        tokens = tokens[:, None] if tokens.ndim == 2 else tokens
        found, lengths, offsets = self._cosines(tokens)
        if not (finite := lengths.isfinite().all(dim=1)).all():
            wrong = first + int((~finite).nonzero()[0])
            raise StoreError(
                f"{self.store.path}: images/{self.field.key[1]} row {wrong} holds NaN or infinity; "
                "verify the store and extract again"
            )
        if offsets is not None:
            found = found.sub_(offsets[:, None, None])
        if self.queries < len(self.rows):
            found = merge_synonyms(found[None], self.row_queries)[0]
        return found

    def _cosines(self, tokens: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """`[N, I, P]` of unit texts, lengths of the patches `[I, P]`, and the texts' offsets."""
        side = None if self.projection is None else visual_side(self.projection)
        with warnings.catch_warnings():  # a view of the file is read-only, and is only read here
            warnings.filterwarnings("ignore", message=".*not writable")
            given = torch.from_numpy(tokens).flatten(0, 1)
        values = given.to(self.rows.device).float()
        values = values if side is None else side(values)
        text, offsets = split_offsets(self.rows, values.shape[-1])
        lengths = torch.linalg.vector_norm(values, dim=-1)
        cosines = (text @ values.T).div_(lengths.clamp(min=1e-6))
        shape = tokens.shape[:2]
        return cosines.view(-1, *shape), lengths.view(shape), offsets


def searched_field(store: FeatureStore) -> str:
    """The field of a store that is searched, one of `FIELDS`.

    Raises:
        StoreError: it has none of them.
    """
    for name in FIELDS:
        if name in store.images:
            return name
    raise StoreError(
        f"{store.path}: has none of {', '.join(FIELDS)} to compare words with; extract again with "
        "features=dense, or features=pooled for pictures without the place"
    )


def picture_scores(scores: Tensor, best: int) -> Tensor:
    """The mean of the `best` highest patches of every picture: `[..., P]` to `[...]`."""
    if best == 1 or scores.shape[-1] == 1:
        return scores.amax(dim=-1)
    return scores.topk(min(best, scores.shape[-1]), dim=-1).values.mean(dim=-1)


def best_pictures(
    scan: Scan, top: int, best: int, advance: Advance = lambda done, total: None
) -> tuple[Tensor, Tensor]:
    """The best pictures of every query; of equal ones the first in the store.

    A picture whose best patch is below the `top` pictures found so far is not looked at further.
    What is kept does not depend on the size of the store.

    Args:
        scan: queries and store.
        top: pictures of each query.
        best: patches of a picture whose mean score counts.
        advance: gets (pictures compared, all).

    Returns:
        Scores `[Q, K]` float32 and rows in the store `[Q, K]` int64, the best first;
        K = min(top, images).
    """
    total = len(scan.field)
    count = min(top, total)
    kept = torch.full((scan.queries, count), -torch.inf, device=scan.rows.device)
    rows = torch.zeros_like(kept, dtype=torch.int64)
    for first, scores in scan:
        bound = scores.amax(dim=-1)  # [Q, I]
        possible = bound > kept[:, -1:]
        if possible.any():
            new = torch.full_like(bound, -torch.inf)
            new[possible] = picture_scores(scores[possible], best)
            numbers = torch.arange(first, first + bound.shape[1], device=rows.device)
            both = torch.cat([rows, numbers.expand(len(rows), -1)], dim=1)
            merged = torch.cat([kept, new], dim=1).sort(dim=1, descending=True, stable=True)
            kept = merged.values[:, :count].contiguous()
            rows = both.gather(1, merged.indices[:, :count])
        advance(first + bound.shape[1], total)
    return kept.cpu(), rows.cpu()


@dataclass(frozen=True, eq=False)
class Found:
    """A picture in which a query was found.

    Attributes:
        query: its name.
        rank: from 1, the best picture.
        score: of its best patches: sigmoid of their mean, on the scale of `segment`.
        row: of the picture in `store.images`.
        id: of the picture in its source.
        file_name: as the source named it, or None if the store has no names.
        grid: `[rows, columns]` float32 score of every patch of the square that was encoded, NaN
            where no patch was kept; None in a store of pooled features.
        side: of that square in pixels, 0 without a grid.
    """

    query: str
    rank: int
    score: float
    row: int
    id: int
    file_name: str | None
    grid: Tensor | None = field(repr=False)
    side: int = 0

    @property
    def patch(self) -> tuple[int, int] | None:
        """Row and column of the best patch."""
        if self.grid is None:
            return None
        place = int(self.grid.nan_to_num(-torch.inf).argmax())
        return divmod(place, self.grid.shape[1])

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the best patch in pixels of the encoded square.

        `datasets.captions.base.from_square` says where that lies in the picture.
        """
        if self.patch is None or self.grid is None:
            return None
        row, column = self.patch
        step = self.side // len(self.grid)
        return column * step, row * step, (column + 1) * step, (row + 1) * step


def found_pictures(
    scan: Scan, names: Sequence[str], top: int, best: int, advance: Advance
) -> Iterator[Found]:
    """The results of `best_pictures` one by one, query after query, with their grids.

    The grids are computed anew from the rows of the pictures, so that none are kept.
    """
    images, stored = scan.store.images, scan.field
    dense = stored.key[1] == PATCHES
    kept, rows = best_pictures(scan, top, best if dense else 1, advance)
    many = max(1, BLOCK // stored.row_bytes)
    for number, name in enumerate(names):
        own = scan.only(number)
        for start in range(0, rows.shape[1], many):
            found = rows[number, start : start + many].numpy()
            grids: Sequence[Tensor | None] = [None] * len(found)
            side = 0
            if dense:
                scores = own.scores(stored[found])[0].sigmoid().cpu()
                grids, side = _on_grid(scan.store, found, scores)
            ids, files = (
                images[key][found] if key in images else None for key in ("id", "file_name")
            )
            for place, row in enumerate(found.tolist()):
                yield Found(
                    name,
                    start + place + 1,
                    float(kept[number, start + place].sigmoid()),
                    row,
                    row if ids is None else int(ids[place]),
                    None if files is None else str(files[place]),
                    grids[place],
                    side,
                )


def _on_grid(
    store: FeatureStore, rows: NDArray[np.int64], scores: Tensor
) -> tuple[Sequence[Tensor], int]:
    """Scores `[I, P]` on the grid of all patches, and the side of the square in pixels."""
    vision = store.vision
    if vision is None or not vision.patch_size:
        raise StoreError(f"{store.path}: its manifest does not say the size of a patch")
    side = vision.image_size // vision.patch_size
    if "patch_index" not in store.images:
        if side * side != scores.shape[1]:
            raise StoreError(
                f"{store.path}: {scores.shape[1]} patches of an image do not fill the {side} x "
                f"{side} of its manifest; extract again"
            )
        return list(scores.view(-1, side, side)), side * vision.patch_size
    places = torch.from_numpy(store.images["patch_index"][rows])
    grids = torch.full((len(rows), side * side), torch.nan).scatter_(1, places, scores)
    return list(grids.view(-1, side, side)), side * vision.patch_size


def check_search(top: int, best: int) -> None:
    """Refuse counts that mean nothing (ConfigError)."""
    for key, value, most in (("top", top, 10_000), ("best", best, 4096)):
        check_number(key, value, 1, most)
