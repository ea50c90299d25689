"""The LightningModule: projection, similarity and loss connected, on one or many devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from talk2dino.alignment.checkpoint import describe_projection
from talk2dino.alignment.inputs import projected_text, projected_visual
from talk2dino.alignment.patch_mixture import patch_mixture
from talk2dino.alignment.projection import Projection
from talk2dino.alignment.retrieval import retrieval_metrics
from talk2dino.alignment.similarity import Similarity
from talk2dino.alignment.word_loss import WordLoss
from talk2dino.errors import ConfigError

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler


class AlignmentModule(L.LightningModule):
    """Trains a projection so that captions and images of a pair come close.

    Every rank compares all ranks' texts with its own images and shares the columns, so the loss
    sees the full [B·W, B·W] matrix while no patch token leaves its device. The gathers carry
    gradients; with DDP's mean over ranks the gradient equals that of one process with the whole
    batch.

    Args:
        projection: ψ.
        similarity: how a text and an image are compared in training.
        loss: of the score matrix, called with the image ids.
        optimizer: makes an optimizer of parameters.
        scheduler: makes a learning rate schedule of an optimizer, `total_steps` and
            `steps_per_epoch`, stepped once per optimizer step; None leaves the rate constant.
        val_similarity: how they are compared in validation (recall).
        encoders: specs of the encoders, `{"vision": …, "text": …}`, stored in every checkpoint.
        words: a second loss, of the words of the captions; None has only that of whole captions.
    """

    def __init__(
        self,
        projection: Projection,
        similarity: Similarity,
        loss: torch.nn.Module,
        optimizer: Callable[[Iterator[torch.nn.Parameter]], Optimizer],
        scheduler: Callable[..., Scheduler] | None,
        val_similarity: Similarity,
        encoders: dict[str, Any],
        words: WordLoss | None = None,
    ) -> None:
        super().__init__()
        self.projection, self.similarity, self.loss = projection, similarity, loss
        self.val_similarity, self.words = val_similarity, words
        self._optimizer, self._scheduler, self.encoders = optimizer, scheduler, encoders
        self._val_batches: list[dict[str, Tensor]] = []
        self._steps, self._of_one_image = 0, torch.tensor(0)  # of this epoch

    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the score matrix [text, image] over all ranks, and the image id of each row."""
        text, mask, chosen = self._texts_and_images(batch)
        return self._caption_scores(text, mask, chosen), gather_rows(batch["image_id"])

    def _texts_and_images(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Captions of this rank with their token mask, and what stands for their images."""
        text, mask = projected_text(batch, self.projection, self.similarity)
        visual = projected_visual(batch, self.projection, self.similarity)
        return text, mask, self.similarity.select(text, visual)

    def _caption_scores(self, text: Tensor, mask: Tensor | None, chosen: Tensor) -> Tensor:
        columns = self.similarity.scores(
            gather_rows(text), chosen, None if mask is None else gather_rows(mask)
        )  # [B·W, B]
        return gather_rows(columns.T.contiguous()).T

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one batch."""
        text, mask, chosen = self._texts_and_images(batch)
        scores, image_ids = self._caption_scores(text, mask, chosen), gather_rows(batch["image_id"])
        loss: Tensor = self.loss(scores, image_ids)
        self._steps += 1
        self._of_one_image = self._of_one_image + (image_ids == image_ids[0]).all()  # no sync
        if self.words is not None:
            found = self._word_loss(self.words, chosen, batch["image_row"], batch_index)
            loss = self.words.options.caption_weight * loss + found
        self.log("train/loss", loss, prog_bar=True, batch_size=len(image_ids))
        return loss

    def _word_loss(
        self, words: WordLoss, chosen: Tensor, image_row: Tensor, batch_index: int
    ) -> Tensor:
        """Every rank compares the same words with its own images and shares the columns."""
        rows, options = gather_rows(image_row), words.options
        step = words.choose(rows, (self.global_step, batch_index))
        text = self.projection.project_text(words.embeddings[step.index])
        columns = words.similarity.scores(text[: len(step.compared)], chosen)  # [K, B]
        found: Tensor = words(gather_rows(columns.T.contiguous()).T, step)
        self.log("train/word_loss", found, batch_size=len(rows))
        loss = options.weight * found
        if options.mixture:
            mixed = patch_mixture(
                text,
                words.few_patches(chosen),
                step.positive[:, own_rows(len(image_row))],
                options.concentration,
                options.unexplained,
                gather_rows,
            )
            self.log("train/mixture_loss", mixed, batch_size=len(rows))
            loss = loss + options.mixture * mixed
        return loss

    def on_fit_start(self) -> None:
        """Refuse ranks that found different words: they would draw different ones."""
        if self.words is not None:
            own = torch.tensor([list(self.words.digest.encode())], device=self.device)
            digests = gather_rows(own)  # [W, 64]
            if (digests != digests[0]).any():
                raise ConfigError(
                    "words: the ranks found different words in their captions; give all ranks the "
                    "same store and the same version of talk2dino"
                )

    def on_train_epoch_end(self) -> None:
        """Refuse weights that are not finite; say of how many steps nothing could be learned.

        Lightning writes the checkpoints of the epoch after this.

        Raises:
            ConfigError: the weights are not finite.
        """
        if not all(bool(one.isfinite().all()) for one in self.projection.parameters()):
            raise ConfigError(
                f"train: the weights are not finite after step {self.global_step}; use a lower "
                "optimizer.lr, or trainer.gradient_clip_val=1"
            )
        if found := int(self._of_one_image):
            rank_zero_warn(
                f"{found} of {self._steps} steps had captions of one image only, from which "
                "nothing is learned; use a larger data.batch_size or data.captions=one_per_image"
            )
        self._steps, self._of_one_image = 0, torch.tensor(0)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Project one batch; the metrics are computed from all of them.

        An image is kept once, however many captions it has.
        """
        text, mask = projected_text(batch, self.projection, self.val_similarity)
        visual = projected_visual(batch, self.projection, self.val_similarity)
        ids, first = first_occurrences(batch["image_id"])
        if self._val_batches:
            new = ~torch.isin(ids, torch.cat([kept["visual_id"] for kept in self._val_batches]))
            ids, first = ids[new], first[new]
        kept = {"text": text, "image_id": batch["image_id"]}
        kept |= {"visual": visual[first], "visual_id": ids}
        self._val_batches.append(kept if mask is None else kept | {"mask": mask})

    def on_validation_epoch_end(self) -> None:
        """Log recall at 1, 5 and 10, median and mean rank in both directions."""
        if not self._val_batches:
            return
        text, visual, captions, image_ids = (
            torch.cat([batch[key] for batch in self._val_batches])
            for key in ("text", "visual", "image_id", "visual_id")
        )
        masks = [batch["mask"] for batch in self._val_batches if "mask" in batch]
        self._val_batches.clear()
        metrics = retrieval_metrics(
            self.val_similarity.scores,
            text,
            visual,
            captions,
            image_ids,
            text_mask=torch.cat(masks) if masks else None,
        )
        self.log_dict({f"val/{name}": value for name, value in metrics.items()})
        self.log("recall@5", metrics["text_to_image/recall@5"], prog_bar=True, logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimize the projection and, if it is learnable, the loss's logit scale."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self._optimizer(iter(parameters))
        if self._scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        scheduler = self._scheduler(optimizer, total_steps=steps, steps_per_epoch=per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to use the projection without the training config."""
        checkpoint["talk2dino"] = self.description()

    def description(self) -> dict[str, Any]:
        """Plain values: the projection's class and arguments, and the encoders' specs."""
        return {"projection": describe_projection(self.projection), **self.encoders}


def own_rows(count: int) -> slice:
    """Where the `count` rows of this rank are among those of `gather_rows`."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return slice(rank * count, (rank + 1) * count)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate equal [B, ...] tensors of all ranks in rank order, with gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    """All ranks use all rows, so a row's gradient is the sum of the gradients of all ranks.

    `torch.distributed.nn.functional.all_gather` does the same and is deprecated since torch 2.14;
    these two collectives are in all versions and all backends.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * int(ctx.count)
        return total[start : start + ctx.count]


def first_occurrences(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of [N], ascending, and the position where each first occurs."""
    unique, number = torch.unique(values, return_inverse=True)
    positions = torch.arange(len(values), device=values.device)
    first = torch.full_like(unique, len(values)).scatter_reduce(0, number, positions, "amin")
    return unique, first
