"""Images per second and peak memory of a dense and a pruned model, the two taking turns.

    python benchmarks/throughput.py deit_small_patch16_224 --budget macs=-50%    # widths cut alike, weights drawn
    python benchmarks/throughput.py deit_small_patch16_224 --heads 3 --min-width 64       # whole heads, not dimensions
    python benchmarks/throughput.py runs/mine/dense --pruned runs/mine           # what gohsp wrote
    python benchmarks/throughput.py deit_small_patch16_224 --budget macs=-50% --device cuda

A model is a timm name or a folder that gohsp wrote; time does not depend on what the weights are. ``promised`` is the
ratio of MACs, ``speedup`` the measured one, ``achieved`` their quotient. Peak memory is that of one batch, weights not
counted: on a GPU what torch allocated, on a CPU what a process of its own took (Linux only). ``profile`` says where an
uncompiled pass spends its time: softmax and norms do not shrink with heads' dimensions and hidden units.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gohsp
from gohsp import latency, structure
from gohsp.core.allocation import WidthSettings
from gohsp.structure import AttentionWidths, SublayerWidths, parse_budget
from shared import RESULTS, changed, even_widths, example_of, machine, parser, read_results, resized, say, write_results

Case = tuple[str, int, bool]
"""Data type, batch size and whether compiled."""

CASES: dict[str, list[Case]] = {
    "cuda": [*itertools.product(["bfloat16"], [1, 64, 256], [False, True])],
    "cpu": [*itertools.product(["float32", "bfloat16"], [1, 32], [False])],
}
"""By device."""


def contestants(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The dense and the pruned model."""
    dense = gohsp.open_model(options.model)
    if options.pruned:
        return dense, gohsp.load(options.pruned)
    goal = parse_budget(options.budget)
    if goal.kind == "latency":
        sys.exit("give a budget in params or macs: its promise is what is measured here")
    network = gohsp.describe(dense)
    bound = structure.bound_for(network, goal)
    widths = WidthSettings(multiple=options.multiple, min_width=options.min_width)
    images = example_of(dense)
    few = dense
    if options.heads:
        few = resized(dense, changed(network.widths, lambda f, now: options.heads if f == "heads" else now), images)
    chosen = even_widths(gohsp.describe(few), f"{goal.kind}={int(bound.limit)}", widths)
    return dense, resized(few, chosen, images)


def written(widths: SublayerWidths) -> str:
    """A sub-layer's widths in words."""
    if isinstance(widths, AttentionWidths):
        return f"{widths.heads} heads of q/k {widths.qk} and v/o {widths.vo}"
    return f"FFN {widths.units}"


def gpu_or_processor(device: str) -> str:
    """What was measured on."""
    found = machine(device)
    return found["device"] if device == "cuda" else found["processor"]


def batch_of(model: nn.Module, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random images that the model takes."""
    return torch.randn(size, *example_of(model).shape[1:], device=device, dtype=dtype)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a pass takes beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what the allocator keeps from before would not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
    before = peak_resident()
    call()
    return (peak_resident() - before) / 2**10


@torch.no_grad()
def fresh_peak(options: argparse.Namespace, which: int, case: Case) -> float:
    """Peak memory of one contestant on a CPU; to be run in a process of its own."""
    dtype, size, _ = case
    model = contestants(options)[which].to(getattr(torch, dtype))
    images = batch_of(model, size, getattr(torch, dtype), torch.device("cpu"))
    model(images[:1])
    return peak_memory(lambda: model(images), torch.device("cpu"))


def peak_resident() -> int:
    """Most memory that this process held at once, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def kind_of(operator: str) -> str:
    """What an operator counts as in a profile."""
    if "scaled_dot_product" in operator:
        return "attention"
    return "products" if any(part in operator for part in ("mm", "conv", "linear")) else "rest"


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one pass by kind of operator."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        call()
    found = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in seen.key_averages():
        if event.key.startswith("aten::"):  # kernels stand there once more under their own names
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[kind_of(event.key)] += spent / 1e3
    return {kind: round(ms, 1) for kind, ms in found.items()}


@torch.no_grad()
def measured(options: argparse.Namespace, case: Case, *, fresh: bool) -> dict[str, Any]:
    """Both models under one case.

    Args:
        options: The models, device and rounds.
        case: What they are measured at.
        fresh: Whether memory is measured in processes of their own: what a process of a CPU took before hides what a
            pass takes.
    """
    dtype, size, compiled = case
    device = torch.device(options.device)
    pair = [model.to(device, getattr(torch, dtype)) for model in contestants(options)]
    costs = [gohsp.count_macs(network) for network in map(gohsp.describe, pair)]
    images = batch_of(pair[0], size, getattr(torch, dtype), device)
    torch._dynamo.reset()  # a batch size met before would make the graph a dynamic one
    networks: list[Any] = [torch.compile(model, dynamic=False) if compiled else model for model in pair]
    calls = [lambda n=n: n(images) for n in networks]
    times = latency.interleaved(calls, device, options.rounds)
    if fresh:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = [pool.apply(fresh_peak, (options, which, case)) for which in (0, 1)]
    else:
        memory = [peak_memory(call, device) for call in calls]
    promised, speedup = costs[0] / costs[1], times[0] / times[1]
    return {
        "dtype": dtype,
        "batch": size,
        "compiled": compiled,
        "images_per_second": [round(1e3 * size / t, 1) for t in times],
        "peak_memory_mib": [round(m, 1) for m in memory],
        "promised": round(promised, 3),
        "speedup": round(speedup, 3),
        "achieved": round(speedup / promised, 3),
        "profile": None if compiled else [profiled(call, device) for call in calls],
    }


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What the cases of a pair have in common, and room for them."""
    return {
        "command": f"python benchmarks/throughput.py {named(options)} --device {options.device}",
        "machine": gpu_or_processor(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": sorted(set(map(written, gohsp.describe(contestants(options)[1]).widths.values()))),
        "cases": [],
    }


def named(options: argparse.Namespace) -> str:
    """The pair in words, as the command line takes them."""
    name = Path(options.model).name
    if options.pruned:
        return f"{name} --pruned {options.pruned.name}"
    heads = f" --heads {options.heads}" if options.heads else ""
    return f"{name} --budget {options.budget} --multiple {options.multiple} --min-width {options.min_width}{heads}"


def parser_of() -> argparse.ArgumentParser:
    """What can be asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--budget", default="macs=-50%")
    arguments.add_argument("--multiple", type=int, default=8, help="of all widths (widths.multiple)")
    arguments.add_argument("--min-width", type=int, default=8, help="of queries, keys and values (widths.min_width)")
    arguments.add_argument("--heads", type=int, help="heads that every block keeps; all, unless given")
    arguments.add_argument("--pruned", type=Path, help="folder of a pruned model, instead of a budget")
    arguments.add_argument("--device", choices=CASES, default="cpu")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--results", type=Path, default=RESULTS / "throughput.json")
    return arguments


def main() -> None:
    """Measure every case of the device, writing the results after each."""
    options = parser_of().parse_args()
    results = read_results(options.results, {})
    record = results[f"{named(options)} {options.device}"] = header(options)
    for case in CASES[options.device]:
        record["cases"].append(measured(options, case, fresh=options.device == "cpu"))
        write_results(options.results, results)
        say(str(record["cases"][-1]))


if __name__ == "__main__":
    main()
