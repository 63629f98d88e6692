"""Training stages on PyTorch and timm: plain, distilled, and with ADMM's pull."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp import files
from gohsp.config import StageSettings, TrainingSettings
from gohsp.core import admm
from gohsp.core.capture import autocast, device_of
from gohsp.core.objective import tensor_in
from gohsp.errors import CheckpointError, ConfigError, NonFiniteError, nearest, require_packages
from gohsp.evaluation import Metrics
from gohsp.runtime import ProgressCallback, fast_attention, telling, unheard

logger = logging.getLogger(__name__)

Schedule = Literal["cosine", "constant"]


class Batches(Protocol):
    """Batches of images and labels, anew with every iteration."""

    def __len__(self) -> int:
        """Batches in one pass."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Pairs of images ``[B, C, H, W]`` and labels ``[B]``."""
        ...


@dataclass(frozen=True)
class Epoch:
    """One line of a stage's curve; ``top1`` and ``loss`` are on the validation split, None where not evaluated."""

    epoch: int
    train_loss: float
    top1: float | None
    loss: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its curve, and the ADMM state it ended in."""

    curve: tuple[Epoch, ...]
    admm: admm.AdmmState | None


def require_optimizer(name: str) -> None:
    """Check that timm has an optimiser.

    Raises:
        ConfigError: It has none of that name.
        MissingPackageError: timm is not installed.
    """
    require_packages("training", "train", "timm")
    from timm.optim import list_optimizers  # pruning alone trains nothing, and needs no timm

    known = [str(known) for known in list_optimizers()]
    if name not in known:
        raise ConfigError(f"training.optimizer '{name}' is unknown; {nearest(name, known)}")


def train(
    model: nn.Module,
    loader: Batches,
    stage: StageSettings,
    settings: TrainingSettings,
    *,
    name: str,
    precision: torch.dtype,
    seed: int,
    num_classes: int,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    teacher: nn.Module | None = None,
    state: admm.AdmmState | None = None,
    refresh: Callable[[admm.AdmmState], admm.AdmmState] | None = None,
    checkpoint: Path | None = None,
    schedule: Schedule = "cosine",
    progress: ProgressCallback = unheard,
) -> StageResult:
    """Train ``model`` in place for one stage.

    Interrupted and called again with the same ``checkpoint``, it goes on after the last finished epoch, with
    the same result as if it had not been interrupted (up to the order of floating-point sums). If that file is damaged,
    it begins anew with a warning.

    Args:
        model: Where it is, it is trained.
        loader: Batches of images and labels; if it or its sampler has ``set_epoch``, that is called.
        stage: Length and rate.
        settings: Everything else.
        name: What progress and errors call the stage.
        precision: Data type of the passes; below float32 by autocast.
        seed: Of dropout, mixup and stochastic depth.
        num_classes: Classes of the labels.
        evaluate: Scores the model after epochs.
        teacher: The dense model to distil from.
        state: ADMM's state, if this is the ADMM stage; it must hold this ``model``.
        refresh: Called with ADMM's state between epochs, to measure second moments anew.
        checkpoint: File for resuming; its name gets a hash (:func:`gohsp.files.seal`).
        schedule: Of the rate: down a cosine to 1 % of its peak, or constant.
        progress: Is told of every step, and of what each epoch measured.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
        CheckpointError: The file for resuming is another run's.
        StorageError: It cannot be written.
    """
    require_optimizer(settings.optimizer)
    run = _Run(model, loader, stage, schedule, settings, precision, num_classes, teacher)
    first, curve = 0, []
    if checkpoint is not None and (kept := files.sealed(checkpoint)):
        first, curve, state = run.restore(kept, state)
    used = (model,) if teacher is None else (model, teacher)
    steps = (stage.epochs - first) * len(loader)
    with fast_attention(precision, *used), telling(progress, name, steps) as advance:
        for epoch in range(first, stage.epochs):
            _seed(seed + 1000 * (epoch + 1))  # an epoch's draws depend on its number, so that resuming repeats them
            if state is not None and refresh is not None and epoch > 0:
                state = refresh(state)
            began = time.perf_counter()
            loss, state = run.epoch(epoch, state, name, advance)
            due = (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == stage.epochs
            scores = evaluate(model) if evaluate and due else None
            curve.append(
                Epoch(
                    epoch=epoch + 1,
                    train_loss=loss,
                    top1=scores.top1 if scores else None,
                    loss=scores.loss if scores else None,
                    learning_rate=run.rate,
                    seconds=time.perf_counter() - began,
                )
            )
            if checkpoint is not None:
                run.save(checkpoint, epoch + 1, curve, state)
            measured = {name: value for name, value in asdict(curve[-1]).items() if value is not None}
            advance(0, **measured)
    model.eval()
    return StageResult(tuple(curve), state)


def _seed(number: int) -> None:
    """Seed everything that dropout, mixup and stochastic depth draw from; NumPy's seeds have 32 bits."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (timm's mixup draws from it)


class _Run:
    """Optimiser, schedule and losses of one stage."""

    def __init__(
        self,
        model: nn.Module,
        loader: Batches,
        stage: StageSettings,
        schedule: Schedule,
        settings: TrainingSettings,
        precision: torch.dtype,
        num_classes: int,
        teacher: nn.Module | None,
    ) -> None:
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        self.settings, self.loader, self.precision, self.device = settings, loader, precision, device_of(model)
        self.model = self.student = model
        self.teacher = teacher.eval() if teacher is not None and settings.distillation > 0 else None
        self.optimizer = create_optimizer_v2(
            model, opt=settings.optimizer, lr=stage.learning_rate, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        if settings.compile:
            self.student = torch.compile(model)
            self.teacher = None if self.teacher is None else torch.compile(self.teacher)
        self.total = stage.epochs * len(loader)
        lowest = stage.learning_rate * (0.01 if schedule == "cosine" else 1.0)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, self.total),
            lr_min=lowest,
            warmup_t=min(round(stage.warmup * len(loader)), self.total),
            warmup_lr_init=stage.learning_rate * 0.01,
            t_in_epochs=False,
        )
        self.mixup = None
        if settings.mixup > 0 or settings.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )
        self.updates = 0

    @property
    def rate(self) -> float:
        """Present learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch(
        self, number: int, state: admm.AdmmState | None, name: str, advance: Callable[[], None]
    ) -> tuple[float, admm.AdmmState | None]:
        """One pass over the images; returns the mean loss and ADMM's state after it."""
        self.model.train()
        for sampler in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)  # type: ignore[union-attr]
                break
        total, seen = torch.zeros((), device=self.device), 0
        for images, labels in self.loader:
            if not len(labels):  # none of its images could be read
                continue
            loss = self.loss(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            self.scaler.scale(loss).backward()
            state = self.step(state)
            total += loss.detach() * len(images)
            seen += len(images)
            if self.updates % 50 == 1:
                self._require_finite(total, name)
            advance()
        self._require_finite(total, name)
        return float(total) / seen, state

    def step(self, state: admm.AdmmState | None) -> admm.AdmmState | None:
        """One step of the optimiser, and what ADMM does around it."""
        if state is not None:
            admm.add_penalty_gradients(state, self.scaler.get_scale())
        if self.settings.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1
        self.scheduler.step_update(self.updates)
        return None if state is None else admm.after_step(state, self.updates / self.total)

    def _require_finite(self, loss: Tensor, name: str) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of stage '{name}' became NaN or infinite by step {self.updates}; lower its learning_rate, "
                'or set precision = "no"'
            )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy mixed with the divergence from the teacher's predictions."""
        settings, targets = self.settings, labels
        if self.mixup and len(images) % 2 == 0:
            images, targets = self.mixup(images, labels)
        with autocast(self.device, self.precision):
            logits = tensor_in(self.student(images)).float()
        smoothing = 0.0 if targets.is_floating_point() else settings.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), autocast(self.device, self.precision):
            soft = tensor_in(self.teacher(images))
        divergence = F.kl_div(
            logits.log_softmax(-1), soft.float().log_softmax(-1), reduction="batchmean", log_target=True
        )
        return (1 - settings.distillation) * loss + settings.distillation * divergence

    def save(self, path: Path, epochs: int, curve: list[Epoch], state: admm.AdmmState | None) -> None:
        """Write everything that the next epoch depends on."""
        content = {
            "epochs": epochs,
            "curve": [asdict(e) for e in curve],
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "admm": admm.export(state) if state else {},
        }
        files.seal(path, lambda temporary: torch.save(content, temporary))

    def restore(self, path: Path, state: admm.AdmmState | None) -> tuple[int, list[Epoch], admm.AdmmState | None]:
        """Take up what :meth:`save` wrote; nothing but tensors and plain data is unpickled."""
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"'{path}' does not fit this run ({error}); resume with the settings the run was begun with, or start "
                "anew with overwrite"
            ) from error
        self.updates = content["updates"]
        self.scheduler.step_update(self.updates)
        if state is not None:
            state = admm.restore(state, content["admm"])
        return content["epochs"], [Epoch(**e) for e in content["curve"]], state
