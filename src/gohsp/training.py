"""Training stages on Accelerate and timm: plain, distilled, and with ADMM's pull."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gohsp import console, files, models
from gohsp.core import admm
from gohsp.errors import CheckpointError, NonFiniteError, RecipeError, RunError, nearest
from gohsp.measure import Metrics
from gohsp.resident import ResidentLoader
from gohsp.settings import NOT_NEGATIVE, POSITIVE, SHARE, WORKERS, Range, require_settings, whole

logger = logging.getLogger(__name__)

Precision = Literal["auto", "no", "bf16", "fp16"]
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types that mixed precision computes in."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What all training stages have in common.

    Attributes:
        batch_size: Images a step, on each process.
        optimizer: A timm optimiser's name.
        weight_decay: Its weight decay.
        clip_grad: Largest gradient norm; 0 for no limit.
        label_smoothing: Share of the target spread over all classes.
        distillation: Share of the loss that is the divergence from the dense model's predictions (0: labels only).
        temperature: Of both predictions in that divergence.
        mixup: timm's mixup alpha; 0 for none.
        cutmix: timm's cutmix alpha; 0 for none.
        augment: Augmentation of training images: none, light or strong.
        ema: Decay of the moving average of weights that a stage returns (not ADMM's, whose weights are pulled); 0 for
            none.
        precision: Mixed precision of the forward pass; auto takes bf16 where the device has units for it.
        workers: Processes that read images.
        compile: Whether to train through ``torch.compile``; it takes a minute a stage before it pays.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
    """

    batch_size: int = 64
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    label_smoothing: float = 0.1
    distillation: float = 0.5
    temperature: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: Literal["none", "light", "strong"] = "light"
    ema: float = 0.0
    precision: Precision = "auto"
    workers: int = 0
    compile: bool = False
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        require_settings(
            self,
            "training",
            batch_size=whole(),
            weight_decay=NOT_NEGATIVE,
            clip_grad=NOT_NEGATIVE,
            label_smoothing=SHARE,
            distillation=SHARE,
            temperature=Range(0.01, 1000),
            mixup=Range(0, 100),
            cutmix=Range(0, 100),
            ema=Range(0, 1, below=True),
            workers=WORKERS,
            evaluate_every=whole(),
        )
        known = [str(name) for name in list_optimizers()]
        if self.optimizer not in known:
            raise RecipeError(f"training.optimizer '{self.optimizer}' is unknown; {nearest(self.optimizer, known)}")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Length and rate of one training stage; the recipe checks them, which knows the stage's name.

    Attributes:
        epochs: Passes over the training images; 0 leaves the stage out.
        learning_rate: Peak rate.
        warmup: Epochs of linear warm-up.
        schedule: ``cosine`` down to 1 % of the peak, or ``constant``.
    """

    epochs: int = 0
    learning_rate: float = 2e-4
    warmup: float = 0.2
    schedule: Literal["cosine", "constant"] = "cosine"

    def check(self, name: str) -> None:
        """Check every setting; ``name`` is the stage's, by which a recipe writes them.

        Raises:
            RecipeError: One is out of range.
        """
        require_settings(self, name, epochs=whole(0), learning_rate=POSITIVE, warmup=Range(0, 1e6))


@dataclass(frozen=True)
class Epoch:
    """One line of a stage's curve; ``top1`` and ``loss`` are on the validation split, None where not evaluated."""

    epoch: int
    train_loss: float
    top1: float | None
    loss: float | None
    learning_rate: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its curve, and the ADMM state it ended in."""

    curve: tuple[Epoch, ...]
    admm: admm.AdmmState | None


def require_one_process() -> None:
    """Refuse a launch in several processes: each would do the whole run, and write into the same folder.

    Raises:
        RunError: A launcher says that there are several.
    """
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):  # as Accelerate looks
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise RunError(
                f"{name}={os.environ[name]}: several processes (torchrun, accelerate launch, mpirun) are not "
                "supported yet; start one process, on one device"
            )


def make_accelerator(precision: Precision, device: str | None = None) -> Accelerator:
    """Set up the device and mixed precision.

    Args:
        precision: See :class:`TrainingSettings`.
        device: ``cpu`` to stay off an accelerator that is there; None takes the best. Apple's (MPS) is left alone with
            a warning, since it cannot compute in float64, which moments and solves need.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if device != "cpu" and found is not None and found.type == "mps":
        logger.warning("MPS has no float64, which pruning needs: running on the CPU")
        device = "cpu"
    cpu = device == "cpu" or found is None
    # Accelerate holds one device and precision a process and refuses others; each run here has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=resolve_precision(precision, cpu=cpu), cpu=cpu)


def resolve_precision(precision: Precision, *, cpu: bool) -> Literal["no", "bf16", "fp16"]:
    """What ``auto`` means here: bf16 on a CPU with units for it and on a GPU that has it."""
    if precision != "auto":
        return precision
    if cpu:
        # Without such units bf16 on a CPU is emulated and slower than float32.
        units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return "bf16" if any(getattr(torch.cpu, has, lambda: False)() for has in units) else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def autocast_dtype(accelerator: Accelerator) -> torch.dtype:
    """The data type that mixed precision computes in."""
    return PRECISIONS[accelerator.mixed_precision]


def progress_bar(*, disable: bool = False) -> Progress:
    """A progress bar with count, time gone and time left, on standard error."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console.notes,
        disable=disable,
    )


def train(
    model: nn.Module,
    loader: DataLoader[Any] | ResidentLoader,
    stage: StageSettings,
    settings: TrainingSettings,
    *,
    name: str,
    accelerator: Accelerator,
    seed: int,
    num_classes: int,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    teacher: nn.Module | None = None,
    state: admm.AdmmState | None = None,
    refresh: Callable[[admm.AdmmState], admm.AdmmState] | None = None,
    checkpoint: Path | None = None,
    show_progress: bool = True,
) -> StageResult:
    """Train ``model`` in place for one stage.

    Interrupted and called again with the same ``checkpoint``, it goes on after the last finished epoch, with
    the same result as if it had not been interrupted (up to the order of floating-point sums). If that file is damaged,
    it begins anew with a warning.

    Args:
        model: On the accelerator's device.
        loader: Batches of images and labels; it or its sampler offers ``set_epoch``.
        stage: Length and rate.
        settings: Everything else.
        name: What progress and errors call the stage.
        accelerator: Device, precision and processes.
        seed: Of dropout, mixup and stochastic depth.
        num_classes: Classes of the labels.
        evaluate: Scores the model after epochs.
        teacher: The dense model to distil from.
        state: ADMM's state, if this is the ADMM stage; it must hold this ``model``.
        refresh: Called with ADMM's state between epochs, to measure second moments anew.
        checkpoint: File for resuming; its name gets a hash (:func:`gohsp.files.seal`).
        show_progress: Whether to draw a bar.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
        CheckpointError: The file for resuming is another run's.
        StorageError: It cannot be written.
    """
    run = _Run(model, loader, stage, settings, accelerator, num_classes, teacher)
    first, curve = 0, []
    if checkpoint is not None and (kept := files.sealed(checkpoint)):
        first, curve, state = run.restore(kept, state)
    used = (model,) if teacher is None else (model, teacher)
    with fast_attention(autocast_dtype(accelerator), *used), progress_bar(disable=not show_progress) as bar:
        task = bar.add_task(name, total=stage.epochs * len(run.loader), completed=first * len(run.loader), rate="")
        for epoch in range(first, stage.epochs):
            # An epoch's draws depend on its number, so that resuming repeats them; NumPy's seeds have 32 bits.
            set_seed((seed + 1000 * (epoch + 1)) % 2**32)
            if state is not None and refresh is not None and epoch > 0:
                state = refresh(state)
            began = time.perf_counter()
            loss, state = run.epoch(epoch, state, name, lambda rate: bar.update(task, advance=1, rate=rate))
            due = (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == stage.epochs
            scores = evaluate(run.evaluated) if evaluate and due else None
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
            if checkpoint is not None and accelerator.is_main_process:
                run.save(checkpoint, epoch + 1, curve, state)
    run.close()
    return StageResult(tuple(curve), state)


@contextmanager
def fast_attention(precision: torch.dtype, *of: nn.Module) -> Iterator[None]:
    """The faster attention kernel while the context is open: on a CPU in bf16, plain matrix products.

    There PyTorch's fused kernel takes a fifth longer to pass DeiT-Tiny forward at 197 tokens, and back even more.
    """
    with ExitStack() as after:
        for model in of:
            if precision != torch.float32 and next(model.parameters()).device.type == "cpu":
                after.callback(models.set_fused_attention, model, models.set_fused_attention(model, False))
        yield


class _Run:
    """Optimiser, schedule, average and losses of one stage."""

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader[Any] | ResidentLoader,
        stage: StageSettings,
        settings: TrainingSettings,
        accelerator: Accelerator,
        num_classes: int,
        teacher: nn.Module | None,
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.raw_model = model
        self.teacher = teacher.eval() if teacher is not None and settings.distillation > 0 else None
        optimizer = create_optimizer_v2(
            model, opt=settings.optimizer, lr=stage.learning_rate, weight_decay=settings.weight_decay
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # Resident images are on the device and shared out among processes already.
        self.loader = loader if isinstance(loader, ResidentLoader) else accelerator.prepare(loader)
        self.student, self.tutor = self.model, self.teacher
        if settings.compile:
            self.student = torch.compile(self.model)
            self.tutor = None if self.teacher is None else torch.compile(self.teacher)
        self.total = stage.epochs * len(self.loader)
        lowest = stage.learning_rate * (0.01 if stage.schedule == "cosine" else 1.0)
        self.scheduler = CosineLRScheduler(
            self.optimizer.optimizer,
            t_initial=max(1, self.total),
            lr_min=lowest,
            warmup_t=min(round(stage.warmup * len(self.loader)), self.total),
            warmup_lr_init=stage.learning_rate * 0.01,
            t_in_epochs=False,
        )
        self.ema = ModelEmaV3(model, decay=settings.ema) if settings.ema > 0 else None
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

    @property
    def evaluated(self) -> nn.Module:
        """The model that counts: the average, where there is one."""
        return self.ema.module if self.ema else self.raw_model

    def epoch(
        self, number: int, state: admm.AdmmState | None, name: str, advance: Callable[[str], None]
    ) -> tuple[float, admm.AdmmState | None]:
        """One pass over the images; returns the mean loss and ADMM's state after it."""
        self.model.train()
        # Through Accelerate's loader, which otherwise sets its sampler back to the number of its own iterations.
        self.loader.set_epoch(number)
        total, seen, began = torch.zeros((), device=self.accelerator.device), 0, time.perf_counter()
        for images, labels in self.loader:
            if not len(labels):  # none of its images could be read
                continue
            loss = self.loss(images, labels)
            self.accelerator.backward(loss)
            if state is not None:
                scaler = self.accelerator.scaler
                admm.add_penalty_gradients(state, scaler.get_scale() if scaler else 1.0)
            if self.settings.clip_grad > 0:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
            self.scheduler.step_update(self.updates)
            if state is not None:
                state = admm.after_step(state, self.updates / self.total)
            if self.ema:
                self.ema.update(self.raw_model)
            total += loss.detach() * len(images)
            seen += len(images)
            if self.updates % 50 == 1:
                self._require_finite(total, name)
            advance(f"{seen / (time.perf_counter() - began):.0f} img/s")
        self._require_finite(total, name)
        return float(total) / seen, state

    def _require_finite(self, loss: Tensor, name: str) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of stage '{name}' became NaN or infinite by step {self.updates}; lower its learning_rate, "
                'or set training.precision = "no"'
            )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy mixed with the divergence from the teacher's predictions."""
        settings, targets = self.settings, labels
        if self.mixup and len(images) % 2 == 0:
            images, targets = self.mixup(images, labels)
        logits = self.student(images).float()
        smoothing = 0.0 if targets.is_floating_point() else settings.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.tutor is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            soft = self.tutor(images)
        t = settings.temperature
        divergence = F.kl_div(
            (logits / t).log_softmax(-1),
            (soft.float() / t).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - settings.distillation) * loss + settings.distillation * t * t * divergence

    def save(self, path: Path, epochs: int, curve: list[Epoch], state: admm.AdmmState | None) -> None:
        """Write everything that the next epoch depends on."""
        content = {
            "epochs": epochs,
            "curve": [e.to_json() for e in curve],
            "updates": self.updates,
            "model": self.raw_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "ema": self.ema.module.state_dict() if self.ema else {},
            "admm": admm.export(state) if state else {},
        }
        files.seal(path, lambda temporary: torch.save(content, temporary))

    def restore(self, path: Path, state: admm.AdmmState | None) -> tuple[int, list[Epoch], admm.AdmmState | None]:
        """Take up what :meth:`save` wrote; nothing but tensors and plain data is unpickled."""
        try:
            content = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.raw_model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(content["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(content["ema"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"'{path}' does not fit this run ({error}); resume with the recipe the run was begun with, or start "
                "anew with overwrite"
            ) from error
        self.updates = content["updates"]
        self.scheduler.step_update(self.updates)
        if state is not None:
            state = admm.restore(state, content["admm"])
        return content["epochs"], [Epoch(**e) for e in content["curve"]], state

    def close(self) -> None:
        """Put the averaged weights into the model and undo Accelerate's wrapping."""
        if self.ema:
            self.raw_model.load_state_dict(self.ema.module.state_dict())
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.raw_model.eval()
