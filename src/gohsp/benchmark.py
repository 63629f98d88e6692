"""Models side by side: time, throughput and memory, measured in turns, and what they cost (``docs/bench.md``)."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gohsp.config import BATCH_SIZE, ROUNDS, Dtype, LatencySettings
from gohsp.errors import ConfigError, UnsupportedModelError, nearest, one_line
from gohsp.exporting import told_costs
from gohsp.exporting.onnx import OnnxFile, open_file
from gohsp.latency import batch_of, turns
from gohsp.models import input_size, known_macs
from gohsp.runtime import Device, pick_device
from gohsp.settings import require

Model = Callable[[Tensor], object]
"""What can be timed: a module, an ONNX file, or anything else that is called on a batch of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The middle half of what was measured.

    Attributes:
        median: Half is below.
        low: A quarter is below.
        high: A quarter is above.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A model at one batch size.

    Attributes:
        batch_size: Images a batch.
        milliseconds: For a batch, over the rounds.
        images_per_second: At the median time.
        speedup: How many times as fast as the first model: the ratio of both times in a round, over the rounds.
        memory: Bytes held at most: weights, the batch, and what a pass takes beside them. Of an ONNX file, what a fresh
            process grows by at most as it opens the file and computes the batch, on Linux. None of anything else.
    """

    batch_size: int
    milliseconds: Spread
    images_per_second: float
    speedup: Spread
    memory: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Benched:
    """One of the models.

    Attributes:
        name: What it was called.
        params: Parameters; None of what is no module.
        macs: Multiply-accumulates of an image, as :func:`gohsp.count_macs` counts them; None where gohsp cannot
            describe the model. Of an ONNX file both are told by the JSON that gohsp wrote beside it, if any.
        timings: One a batch size.
    """

    name: str
    params: int | None
    macs: int | None
    timings: tuple[Timing, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Models side by side, and how they were measured.

    Attributes:
        models: In the order in which they were given; the first is what the others are compared with.
        image: Channels, height and width.
        dtype: Data type of weights and images.
        device: The GPU's name, or ``cpu``.
        processor: The CPU's name, or its kind.
        threads: Threads that PyTorch computed with on the CPU.
        compiled: Whether ``torch.compile`` was applied.
        rounds: How often each model was timed at each batch size.
        torch: PyTorch's version.
    """

    models: tuple[Benched, ...]
    image: tuple[int, int, int]
    dtype: str
    device: str
    processor: str
    threads: int
    compiled: bool
    rounds: int
    torch: str


@torch.no_grad()
def bench(
    models: Mapping[str, Model | str | Path],
    images: Tensor | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    dtype: Dtype = "float32",
    device: Device = "auto",
    compile: bool = False,
    rounds: int = 21,
) -> Benchmark:
    """Measure models side by side. At each batch size they take turns, round by round.

    Every model first computes a batch of every size, so that nothing is timed if one of them cannot.

    Args:
        models: By name, the first being what the others are compared with. Modules are copied, and left as they are. A
            path is that of an ONNX file, which ONNX Runtime runs on the CPU. Anything else that is callable gets the
            batches as they are, and has no parameters, MACs and memory here.
        images: At least one image ``[B, C, H, W]`` that all models take; None for noise of the size that they tell.
        batch_sizes: Images a batch; 1 for latency, more for throughput.
        dtype: Data type of weights and images: ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        compile: Whether to time what ``torch.compile`` makes of the models, at each batch size anew.
        rounds: How often each model is timed; medians count, and the middle half is shown.

    Raises:
        CheckpointError: A path that is of no ONNX file.
        ConfigError: No models, or a setting that is not allowed, such as a device that is not there.
        UnsupportedModelError: Models that take images of different sizes or channels, something that cannot be called,
            a model that cannot be compiled or compute a batch, or a file of another data type or for another device;
            the message names it.
    """
    if not isinstance(models, Mapping):
        raise ConfigError(
            f"models must be a table of names and models, such as {{'dense': model, 'small': small}}, got a "
            f"{type(models).__name__}"
        )
    settings = _settings(batch_sizes, dtype, rounds)
    _require_one_of("device", device, Device)
    place = pick_device(device)
    given = {name: _opened(model) for name, model in models.items()}
    example = _example(given, images, compile)
    _require_fitting(given, dtype, place)
    ready = {name: _ready(model, place, getattr(torch, dtype)) for name, model in given.items()}
    costs = {name: _costs(model, example) for name, model in ready.items()}
    timed = {name: torch.compile(model, dynamic=False) if compile else model for name, model in ready.items()}
    batches = [batch_of(example, place, how) for how in settings]
    _try(timed, batches, compile)
    found = [_timings(ready, timed, batch, how) for batch, how in zip(batches, settings, strict=True)]
    return Benchmark(
        models=tuple(
            Benched(name=name, params=params, macs=macs, timings=tuple(at[name] for at in found))
            for name, (params, macs) in costs.items()
        ),
        image=(example.shape[1], example.shape[2], example.shape[3]),
        dtype=dtype,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        compiled=compile,
        rounds=rounds,
        torch=torch.__version__,
    )


# Checks


def _settings(batch_sizes: Sequence[int], dtype: Dtype, rounds: int) -> list[LatencySettings]:
    """One for each batch size, after all have been checked under the names that they have here."""
    if not isinstance(batch_sizes, Sequence) or not batch_sizes:
        raise ConfigError(f"batch_sizes must be a list of numbers of images, such as [1, 32], got {batch_sizes!r}")
    for size in batch_sizes:
        require("batch_sizes", size, BATCH_SIZE)
    require("rounds", rounds, ROUNDS)
    _require_one_of("dtype", dtype, Dtype)
    return [LatencySettings(batch_size=size, dtype=dtype, rounds=rounds) for size in batch_sizes]


def _require_one_of(key: str, value: str, choices: object) -> None:
    names = typing.get_args(choices)
    if value not in names:
        raise ConfigError(f"{key} {value!r} is unknown; {nearest(str(value), names)}")


def _opened(model: Model | str | Path) -> Model:
    """A model that can be called: an ONNX file is opened, everything else is as it is."""
    return open_file(model, torch.get_num_threads()) if isinstance(model, str | Path) else model


def _require_fitting(models: Mapping[str, Model], dtype: Dtype, device: torch.device) -> None:
    """Check that files can be measured as is asked for: they are what they are, and run on the CPU."""
    for name, model in models.items():
        if isinstance(model, OnnxFile) and str(model.dtype) != f"torch.{dtype}":
            raise UnsupportedModelError(
                f"'{name}' takes images of {str(model.dtype).removeprefix('torch.')}, and {dtype} is to be measured; "
                "give dtype (--dtype) as the file has it"
            )
        if isinstance(model, OnnxFile) and device.type != "cpu":
            raise UnsupportedModelError(
                f"'{name}' runs on the CPU, and {device.type} is to be measured; give device='cpu' (--device cpu)"
            )


def _example(models: Mapping[str, Model], images: Tensor | None, compile: bool) -> Tensor:
    """An image that all models take, after they have been looked at."""
    if not models:
        raise ConfigError("there is nothing to measure; give at least one model")
    for name, model in models.items():
        if not callable(model):
            raise UnsupportedModelError(f"'{name}' cannot be called on images: it is of type {type(model).__name__}")
        if compile and not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"'{name}' cannot be compiled: it is a {type(model).__name__}, no torch.nn.Module; leave compile out"
            )
    if images is not None:
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise UnsupportedModelError(f"images must be a tensor [B, C, H, W], got {getattr(images, 'shape', images)}")
        return images
    sizes = {name: input_size(model) for name, model in models.items() if isinstance(model, nn.Module)}
    sizes |= {name: model.size for name, model in models.items() if isinstance(model, OnnxFile) and model.size}
    if not sizes:
        raise ConfigError("none of the models tells the size of its images, as modules and most files do; give images")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"'{name}' {list(size)}" for name, size in sizes.items())
        raise UnsupportedModelError(
            f"the models take images [channels, height, width] of different sizes: {told}; compare models of one size, "
            "or, in Python, give images that all of them take"
        )
    return torch.randn(1, *next(iter(sizes.values())), generator=torch.Generator().manual_seed(0))


def _try(timed: Mapping[str, Model], batches: Sequence[Tensor], compiled: bool) -> None:
    """Let every model compute every batch once, and be compiled for it where that is asked for."""
    does = "be compiled for" if compiled else "compute"
    # All compiled models count as one function to PyTorch, of which it otherwise leaves some uncompiled, unsaid.
    limit = torch._dynamo.config.recompile_limit + len(timed) * len(batches)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for name, model in timed.items():
            for batch in batches:
                try:
                    model(batch)
                except Exception as error:  # of whatever is called, or of a compiler: they have no base class in common
                    raise UnsupportedModelError(
                        f"'{name}' cannot {does} a batch {list(batch.shape)} of {batch.dtype} on {batch.device}: "
                        f"{one_line(error)}"
                    ) from error


# Costs


def _ready(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    return copy.deepcopy(model).eval().to(device, dtype) if isinstance(model, nn.Module) else model


def _costs(model: Model, example: Tensor) -> tuple[int | None, int | None]:
    """Parameters and MACs of an image, each where it is known."""
    if isinstance(model, OnnxFile):
        return told_costs(model.path)
    if not isinstance(model, nn.Module):
        return None, None
    return sum(parameter.numel() for parameter in model.parameters()), known_macs(model, example)


# Measuring


def _timings(
    ready: Mapping[str, Model], timed: Mapping[str, Model], batch: Tensor, how: LatencySettings
) -> dict[str, Timing]:
    """All models at one batch size."""
    calls = {name: partial(model, batch) for name, model in timed.items()}
    times = dict(zip(calls, turns(list(calls.values()), batch.device, how.rounds), strict=True))
    first = np.array(next(iter(times.values())))
    return {
        name: Timing(
            batch_size=how.batch_size,
            milliseconds=_spread(mine),
            images_per_second=1e3 * how.batch_size / float(np.median(mine)),
            speedup=_spread(first / np.array(mine)),
            memory=_memory(ready[name], calls[name], batch),
        )
        for name, mine in times.items()
    }


def _spread(values: Sequence[float] | np.ndarray) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median=median, low=low, high=high)


def _memory(model: Model, call: Callable[[], object], batch: Tensor) -> int | None:
    """Bytes of a model's weights, of the batch, and of what a pass takes beside them at most."""
    if isinstance(model, OnnxFile):
        return _memory_of_file(model, batch)
    if not isinstance(model, nn.Module):
        return None
    held = [*model.parameters(), *model.buffers(), batch]
    return sum(map(bytes_of, held)) + peak_memory(call, batch.device)


def bytes_of(tensor: Tensor) -> int:
    """What a tensor takes; one that is made of others, as a quantised weight is, takes what they take."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


_GROWTH = """
import pathlib, sys
import numpy, onnxruntime

def told(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

path, threads, dtype, *shape = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget what importing took
before = told("VmRSS")
images = numpy.zeros(list(map(int, shape)), dtype)
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: images})
print(told("VmHWM") - before)
"""


def _memory_of_file(file: OnnxFile, batch: Tensor) -> int | None:
    """Bytes by which a fresh process grows at most while it opens a file and computes a batch; Linux alone tells it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    arguments = [str(file.path), str(torch.get_num_threads()), str(file.dtype).removeprefix("torch.")]
    command = [sys.executable, "-c", _GROWTH, *arguments, *map(str, batch.shape)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at most while something is called, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # That of the CPU keeps no count, but tells a profiler of every piece that it gives out and takes back. The
    # process's own size would not do: it hardly ever shrinks, so that what ran before hides what runs now.
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events]  # type: ignore[attr-defined]  # which PyTorch's stubs leave out
    return max(0, *np.cumsum(sizes).tolist()) if sizes else 0


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without messages of the profiler's library on standard error, such as that there is no GPU."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
