"""What a model scores on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.capture import autocast, device_of
from gohsp.core.objective import tensor_in
from gohsp.errors import DataError, NonFiniteError
from gohsp.runtime import fast_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Scores on a split.

    Attributes:
        top1: Share of images whose label is the first prediction, in percent.
        top5: Share whose label is among the first five (or all, with fewer classes), in percent.
        loss: Mean cross entropy, in nats.
        n: Images counted.
    """

    top1: float
    top5: float
    loss: float
    n: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> Metrics:
    """Score a model.

    Args:
        model: Takes images ``[B, C, H, W]``, returns logits ``[B, classes]`` or a model output that holds them.
        batches: Images and labels; empty batches are skipped.
        precision: Data type of the forward pass; below float32 by autocast.
        advance: Called after each batch, for progress.

    Raises:
        DataError: There are no images, batches without labels, or a label that the model has no class for.
        NonFiniteError: The model returns NaN or infinite logits.
    """
    training, device = model.training, device_of(model)
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    with fast_attention(precision, model):
        for images, labels in map(_pair, batches):
            if not len(labels):  # none of its images could be read
                continue
            with autocast(device, precision):
                logits = tensor_in(model(images.to(device, non_blocking=True))).float()
            _require_classes(labels, logits.shape[1])  # where they come from: on a GPU this would wait for it
            labels = labels.to(device, non_blocking=True)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            counts += torch.stack([top[:, 0].sum(), top.any(1).sum(), loss, loss.new_tensor(len(labels))]).double()
            advance()
    model.train(training)
    top1, top5, loss, n = counts.tolist()
    if n == 0:
        raise DataError("there are no images to evaluate on; check the split")
    if loss != loss or loss == float("inf"):
        raise NonFiniteError("the model's outputs hold NaN or infinite values; check its weights and the preprocessing")
    return Metrics(top1=100 * top1 / n, top5=100 * top5 / n, loss=loss / n, n=int(n))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch of images and labels, which it must be."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise DataError(
            f"scores need batches of two tensors, images [B, C, H, W] and labels [B], got a {type(batch).__name__}; "
            "give a DataLoader of a data set with labels"
        )
    return batch[0], batch[1]


def _require_classes(labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels must be whole numbers [B] from 0 to {classes - 1}, for the model's {classes} classes; got "
            f"{list(labels.shape)} of {labels.dtype} from {labels.min():g} to {labels.max():g}"
        )
