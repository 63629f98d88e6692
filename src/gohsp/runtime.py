"""Where and how passes are computed, and how work tells how far it is."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import nn

from gohsp import models
from gohsp.core.capture import device_of
from gohsp.errors import ConfigError, RunError

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "no", "bf16", "fp16"]
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types that mixed precision computes in."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is.

    Attributes:
        step: What is being done, such as ``damage curves``.
        done: Pieces of work done.
        total: Pieces of work in all.
        metrics: What an epoch of training measured, once it is over: ``epoch``, ``train_loss``, ``learning_rate``,
            ``seconds`` and, where it was scored, ``top1`` and ``loss``; empty of everything else.
    """

    step: str
    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]


def unheard(_progress: Progress) -> None:
    """Tell nobody."""


@contextmanager
def telling(progress: ProgressCallback, step: str, total: int) -> Iterator[Callable[..., None]]:
    """Tell of ``total`` pieces of work; call what is yielded after each, or after none with what was measured."""
    done = 0

    def advance(pieces: int = 1, **metrics: float) -> None:
        nonlocal done
        done += pieces
        progress(Progress(step, done, total, metrics))

    progress(Progress(step, 0, total))
    yield advance


def staged(progress: ProgressCallback, stage: int, stages: int) -> ProgressCallback:
    """Tell of the steps of one of several stages, which come again in the next, by names that say so."""
    return lambda news: progress(replace(news, step=f"{news.step}, stage {stage} of {stages}"))


def pick_device(device: Device) -> torch.device:
    """The accelerator that is there, or the CPU.

    Apple's (MPS) is left alone with a warning, since it cannot compute in float64, which moments and solves need.

    Raises:
        ConfigError: ``cuda`` is asked for where there is none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device 'cuda' is not there, or this PyTorch cannot use it; give 'auto' or 'cpu'")
        return torch.device("cuda")
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "cpu" or found is None:
        return torch.device("cpu")
    if found.type == "mps":
        logger.warning("MPS has no float64, which pruning needs: running on the CPU")
        return torch.device("cpu")
    return found


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The data type of passes; ``auto`` is bf16 on a CPU that is faster in it, on a GPU that has it, else float32."""
    if precision != "auto":
        return PRECISIONS[precision]
    gains = {"cpu": _cpu_gains_by_bf16, "cuda": torch.cuda.is_bf16_supported}.get(device.type, bool)()
    return torch.bfloat16 if gains else torch.float32


@cache
def _cpu_gains_by_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in float32.

    AMX settles it, and so does a CPU without any units for bf16. AVX-512's alone do not: some processors multiply twice
    as fast by them, others half as fast, whatever they are called. There, layers of a ViT's size take turns, and bf16
    has to save a sixth of the time: a processor that is alike in both computes in float32 always.
    """
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    for _ in range(8):
        for dtype, taken in seconds.items():
            layer, values = torch.ones(768, 192, dtype=dtype), torch.ones(2048, 192, dtype=dtype)
            began = time.perf_counter()
            nn.functional.linear(values, layer)
            taken.append(time.perf_counter() - began)
    return 1.2 * min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


@contextmanager
def fast_attention(precision: torch.dtype, *of: nn.Module) -> Iterator[None]:
    """The faster attention kernel while the context is open: on a CPU in bf16, plain matrix products.

    There PyTorch's fused kernel takes a fifth longer to pass DeiT-Tiny forward at 197 tokens, and back even more
    (``docs/oneshot.md``).
    """
    chosen = [model for model in of if precision != torch.float32 and device_of(model).type == "cpu"]
    with models.plain_attention(*chosen):
        yield


def require_one_process() -> None:
    """Refuse a launch in several processes: each would do the whole run, and write into the same folder.

    Raises:
        RunError: A launcher says that there are several.
    """
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise RunError(
                f"{name}={os.environ[name]}: several processes (torchrun, accelerate launch, mpirun) are not "
                "supported yet; start one process, on one device"
            )
