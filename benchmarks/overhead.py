"""What each part of gohsp costs by model size, and what ADMM adds to a training step.

    python benchmarks/overhead.py                                    # four sizes at 224 px, two CPU cores
    python benchmarks/overhead.py --device cuda --images 256 --batch 64                    # one GPU
    python benchmarks/overhead.py --models deit_tiny_patch16_224 --parts admm --batch 64   # a part of it

It times single steps of a pruning, and so calls them (``gohsp.steps``, ``gohsp.core.admm``) where a user calls what is
made of them. Random images; the weights do not matter to the clock. Moments, damage curves and reconstruction (without
mirror images, which double its streams) are timed once and given in units of a forward pass over the same images, in
the same precision and with the same attention kernel: the faster of two after one that is not counted. Ranking, which
weighs tokens in the same pass, and forward passes take turns, and it is given by the medians; in single-precision
passes, too. Solves are as many whatever the number of images; so ``--solves`` times reconstruction at that many images
and at four times as many, once each after one that is not counted, and tells solves from what an image costs.
Plain training steps (AdamW, mixed precision as in training), the pull after each, the Z-steps and the Z-steps that
select anew take turns; medians give ADMM's share at the default interval. It does not depend on the batch, so it is
also given as the number of images that a plain step trains on in that time. What an earlier call measured on the same
device stays in the results.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gohsp
from gohsp import Config, Network, steps
from gohsp.api import open_session
from gohsp.config import CalibrationSettings
from gohsp.core import admm
from gohsp.core.moments import Moments, tensors_of
from gohsp.runtime import fast_attention
from gohsp.session import Session
from gohsp.structure import SublayerWidths
from shared import RESULTS, changed, machine, parser, read_results, say, write_results

PARTS = ("ranking", "moments", "curves", "reconstruction", "admm")
SIZES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")


@dataclass(frozen=True)
class Subject:
    """A model and the images that it is measured with."""

    model: nn.Module
    network: Network
    images: Sequence[Tensor]
    session: Session
    analysis: steps.Analysis

    @property
    def precision(self) -> torch.dtype:
        """Of passes in a run."""
        return self.session.precision

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def moments(self) -> Moments:
        """Second moments on the images."""
        return steps.collect_moments(self.session, self.model, self.network, self.analysis)

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self, *, mixed: bool = True) -> torch.autocast:
        """Mixed precision as in a run, or float32."""
        return torch.autocast(self.device.type, self.precision, enabled=mixed and self.precision != torch.float32)

    def fast(self, *, mixed: bool = True) -> AbstractContextManager[None]:
        """The attention kernel of a run."""
        return fast_attention(self.precision, self.model) if mixed else nullcontext()

    @torch.no_grad()
    def forward(self, *, mixed: bool = True) -> None:
        """One pass over the images."""
        for batch in self.images:
            with self.autocast(mixed=mixed), self.fast(mixed=mixed):
                self.model(batch)


def opened(options: argparse.Namespace, name: str) -> Subject:
    """The model with weights as they are drawn."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model = timm.create_model(name).to(device).eval()
    config: Any = model.pretrained_cfg
    images = torch.randn(options.images, *config["input_size"], device=device)
    return subject_of(model, images)


def subject_of(model: nn.Module, images: Tensor) -> Subject:
    """A model with images to prune it on, and what one pass of them tells."""
    calibration = CalibrationSettings(images=len(images), holdout=1, mirror=False)
    # The last image is held out of the set, so that it comes twice.
    session = open_session(model, torch.cat([images, images[-1:]]), config=Config(calibration=calibration))
    network = gohsp.describe(model)
    return Subject(model, network, images.split(64), session, steps.analyse(session, model, network))


def halved(network: Network) -> dict[str, SublayerWidths]:
    """Every width but the number of heads at a half."""
    return changed(network.widths, lambda field, count: count if field == "heads" else count // 2)


def cost(subject: Subject, work: Callable[[], object]) -> dict[str, float]:
    """Seconds of ``work``, and as forward passes over the same images."""
    subject.forward()
    once = min(subject.seconds(subject.forward) for _ in range(2))
    seconds = subject.seconds(work)
    return {"seconds": round(seconds, 3), "forward_passes": round(seconds / once, 2)}


def medians(subject: Subject, works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of pieces of work that take turns, after a turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            seconds = subject.seconds(work)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def ranking_cost(subject: Subject, rounds: int) -> dict[str, float]:
    """Seconds of a ranking, and as forward passes over the same images in its and in single precision."""

    def rank() -> object:
        return steps.analyse(subject.session, subject.model, subject.network)

    times = medians(subject, {"rank": rank, "pass": subject.forward}, rounds)
    single = medians(subject, {"pass": partial(subject.forward, mixed=False)}, rounds)
    return {
        "seconds": round(times["rank"], 3),
        "forward_passes": round(times["rank"] / times["pass"], 2),
        "float32_passes": round(times["rank"] / single["pass"], 2),
    }


def parts(subject: Subject, wanted: Sequence[str], solves: int) -> dict[str, Any]:
    """What the parts between ranking and ADMM cost."""
    model, network, analysis = subject.model, subject.network, subject.analysis

    def reconstruct(of: Subject = subject) -> object:
        return steps.cut(of.session, model, copy.deepcopy(model), network, analysis, halved(network))

    works: dict[str, Callable[[], object]] = {
        "moments": lambda: subject.moments,
        "curves": lambda: steps.measure_curves(subject.session, model, network, analysis),
        "reconstruction": reconstruct,
    }
    record = {name: cost(subject, work) for name, work in works.items() if name in wanted}
    if "curves" in record:
        record["curves"]["images"] = min(len(torch.cat(list(subject.images))), steps.CURVE_IMAGES)
    if solves:
        views = torch.randn(4 * solves, *subject.images[0].shape[1:], device=subject.device)
        if "reconstruction" not in wanted:
            reconstruct()
        sides = [subject_of(model, views[:count]) for count in (solves, 4 * solves)]
        few, many = (subject.seconds(partial(reconstruct, side)) for side in sides)
        an_image = (many - few) / (3 * solves)
        record["solves"] = {
            "images": solves,
            "an_image": round(an_image, 5),
            "seconds": round(few - solves * an_image, 3),
        }
    return record


def admm_cost(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """What ADMM adds to a step, and what memory it takes."""
    moments = subject.moments
    model, settings = subject.model.train().requires_grad_(), gohsp.AdmmSettings()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.05, fused=True)
    size = subject.images[0].shape[1:]
    images = torch.randn(options.batch, *size, device=subject.device)
    labels = torch.randint(0, 1000, (options.batch,), device=subject.device)
    state = admm.start(model, subject.network, halved(subject.network), moments, None, settings)

    def plain() -> None:
        with subject.autocast(), subject.fast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    # one step before, resp. at the end of, an interval; the state itself does not move on
    works = {
        "plain_step": plain,
        "pull": lambda: admm.after_step(replace(state, step=0), 0.0),
        "z_step": lambda: admm.dual_update(replace(state, dual_updates=0), 0.0),
        "selecting_z_step": lambda: admm.dual_update(replace(state, dual_updates=settings.reselect - 1), 0.0),
    }
    middle = medians(subject, works, options.rounds)
    rare = middle["selecting_z_step"] - middle["z_step"]
    added = middle["pull"] + (middle["z_step"] + settings.freeze * rare / settings.reselect) / settings.interval
    return {
        "batch": options.batch,
        "seconds": {name: round(value, 5) for name, value in middle.items()},
        "ratio": round(1 + added / middle["plain_step"], 4),
        "in_images": round(added / middle["plain_step"] * options.batch, 2),
        "weights_mib": round(sum(map(size_of, model.parameters())) / 2**20, 1),
        "state_mib": round(state_size(state) / 2**20, 1),
    }


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def state_size(state: admm.AdmmState) -> int:
    """Bytes that ADMM holds: anchors, duals, moments and their copy in float32, and the projections' matrices."""
    values = [t for side in (state.anchors, state.duals) for of in side.values() for t in of.values()]
    moments = [t for side in (state.moments, state.norms) for of in side.values() for t in tensors_of(of)]
    takeovers = [p.takeover for p in state.projections.values() if p.takeover is not None]
    return sum(map(size_of, values + moments + takeovers))


def measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The wanted costs of one model; to be run in a process of its own."""
    subject = opened(options, name)
    ranked = {"ranking": ranking_cost(subject, options.rounds)} if "ranking" in options.parts else {}
    record: dict[str, Any] = ranked | parts(subject, options.parts, options.solves)
    for part in record.values():
        part.setdefault("images", options.images)
    if "admm" in options.parts:
        record["admm"] = admm_cost(subject, options)
    for part in record.values():
        part |= {"command": command_of(options), "processor": processor(subject.device)}
    return {"params": sum(p.numel() for p in subject.model.parameters())} | record


def processor(device: torch.device) -> str:
    """What the clock depends on most."""
    found = machine(device)
    return found["device"] if device.type == "cuda" else found["processor"]


def command_of(options: argparse.Namespace) -> str:
    """What measures the same again."""
    return (
        f"python benchmarks/overhead.py --models {' '.join(options.models)} --parts {' '.join(options.parts)} "
        f"--images {options.images} --solves {options.solves} --batch {options.batch} --rounds {options.rounds} "
        f"--device {options.device} --seed {options.seed}"
    )


def parser_of() -> argparse.ArgumentParser:
    """What can be asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=SIZES)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--images", type=int, default=16, help="that parts are measured on")
    arguments.add_argument("--solves", type=int, default=0, help="images to tell solves at; 0: not told")
    arguments.add_argument("--batch", type=int, default=8, help="of the training step")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--results", type=Path, default=RESULTS / "overhead.json")
    return arguments


def header() -> dict[str, Any]:
    """What all records of a device have in common."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> None:
    """Measure every model, writing the results after each."""
    options = parser_of().parse_args()
    results = read_results(options.results, {})
    record = results.setdefault(options.device, {"models": {}})
    record |= header()
    for name in options.models:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = pool.apply(measured, (options, name))
        record["models"].setdefault(name, {}).update(found)
        write_results(options.results, results)
        say(f"{name}: {found}")


if __name__ == "__main__":
    main()
