"""Which attention head each caption chose in the last epoch of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from talk2dino.alignment.inputs import projected_text, projected_visual
from talk2dino.alignment.module import AlignmentModule, gather_rows
from talk2dino.alignment.similarity import Similarity
from talk2dino.alignment.similarity.heads import head_choice
from talk2dino.errors import ConfigError
from talk2dino.files import replacing
from talk2dino.training.results import show_picture

FIELD = "disentangled_self_attn"


class RecordHeads(L.Callback):
    """Writes `heads.json` and `heads.png` when training ends.

    The choice is that of `max_score`, made with the weights that the training step uses, before
    its update. An epoch that was resumed in its middle, or that `trainer.max_steps` cut short, is
    recorded as far as it ran. `heads.json` holds columns with one entry per caption:
    `caption_id`, `image_id` and `head`, beside the number of the `epoch` (from 0), and how many
    captions chose each head (`captions_per_head`).

    Args:
        folder: run folder.
        similarity: of training.

    Raises:
        ConfigError: the similarity does not compare one vector per caption with heads.
    """

    def __init__(self, folder: Path, similarity: Similarity) -> None:
        if similarity.field != FIELD or similarity.text_field == "token_embeddings":
            raise ConfigError(
                f"record_heads=true: similarity.field={similarity.field} with "
                f"similarity.text_field={similarity.text_field} has no choice of a head; use "
                "similarity=max_score or record_heads=false"
            )
        self.folder = folder
        self.similarity = similarity
        self._rows: list[Tensor] = []  # [B, 3]: caption id, image id, head
        self._epoch, self._heads = 0, 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget the epoch before."""
        self._rows.clear()
        self._epoch = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Any], *_: Any
    ) -> None:
        """Keep the choices of this rank's batch."""
        if not may_be_last_epoch(trainer):
            return
        assert isinstance(module, AlignmentModule)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            text = projected_text(batch, module.projection, self.similarity)[0]
            heads = projected_visual(batch, module.projection, self.similarity)
            choice = head_choice(text, heads, self.similarity.cosine)
        self._heads = heads.shape[1]
        self._rows.append(torch.stack([batch["caption_id"], batch["image_id"], choice], dim=1))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Bring all ranks' choices together; the first rank writes both files."""
        if not self._rows:
            return
        rows = gather_rows(torch.cat(self._rows)).cpu()  # ranks have equally many
        if trainer.is_global_zero:
            self._write(rows[rows[:, 0].argsort(stable=True)])
            show_picture(trainer, "heads", self.folder / "heads.png")

    def _write(self, rows: Tensor) -> None:
        counts = torch.bincount(rows[:, 2], minlength=self._heads).tolist()
        columns = dict(zip(("caption_id", "image_id", "head"), rows.T.tolist(), strict=True))
        content = {"epoch": self._epoch, "captions_per_head": counts, **columns}
        with replacing(self.folder / "heads.json") as path:
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
        with replacing(self.folder / "heads.png") as path:
            draw_histogram(path, counts)


def may_be_last_epoch(trainer: L.Trainer) -> bool:
    """False only if another epoch is certain to follow."""
    last = trainer.max_epochs
    stops_early = trainer.max_steps != -1 or trainer.early_stopping_callbacks
    return last is None or last == -1 or bool(stops_early) or trainer.current_epoch == last - 1


def draw_histogram(path: Path, counts: list[int]) -> None:
    """Draw a bar per head: the share of the captions that chose it, in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    total = sum(counts)
    axes.bar(range(len(counts)), [100 * count / total for count in counts])
    axes.axhline(100 / len(counts), linestyle="--", linewidth=1, color="gray")  # no preference
    axes.set_xticks(range(len(counts)))
    axes.set_xlabel("head")
    axes.set_ylabel(f"% of {total} captions")
    figure.savefig(path, format="png", dpi=110)
