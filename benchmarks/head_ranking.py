"""How well head rankings predict what removing a head costs.

    python benchmarks/head_ranking.py deit_tiny_patch16_224 --weights deit_tiny_patch16_224.safetensors \
        --calibration hfds/imagenet-1k-mini --evaluation hfds/imagenet-1k-mini \
        --out benchmarks/results/head_ranking_deit_tiny.json

The truth is the rise of the loss when one head alone is zeroed (its columns of the output projection), for every
head. Each ranking is scored by the Spearman correlation of its scores with that, over all heads, on two sets of
images: those it was calibrated on, where the defaults were chosen, and others, which chose nothing. A user asks for one
ranking (``gohsp.rank``); the script compares a hundred from the same statistics, and so calls ``gohsp.core``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path, PurePath
from typing import Any, get_args

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import gohsp
from gohsp import Network, data
from gohsp.core.capture import Trunk, observe_inputs, open_trunk
from gohsp.core.gradients import differentiated
from gohsp.core.ranking import HeadStatistics, HeadStatisticsFitter, RankingSettings, rank
from gohsp.core.ranking.ranking import TELEPORTS, head_values
from gohsp.core.ranking.statistics import STATISTICS, Edge, Scope, Statistic
from gohsp.structure import Attention
from shared import classes_of, machine, parser, say, transform_of, versions, write_results

Batch = tuple[Tensor, Tensor]

EDGES, SCOPES = get_args(Edge), get_args(Scope)
DAMPINGS = (0.1, 0.2, 0.3, 0.5, 0.85, 1.0)
RANDOM_DRAWS = 1000
BOOTSTRAPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What zeroing each head alone does, image by image.

    Attributes:
        loss: Rise of the cross entropy with the label ``[images, nodes]``, nats.
        divergence: KL divergence of the dense model's prediction from the cut one's ``[images, nodes]``, nats.
        dense_top1: Accuracy of the dense model, percent.
    """

    loss: Tensor
    divergence: Tensor
    dense_top1: float

    def targets(self) -> dict[str, Tensor]:
        """Means over images ``[nodes]``."""
        return {"loss": self.loss.mean(dim=0), "kl": self.divergence.mean(dim=0)}


def load_images(source: str, split: str, count: int, model: nn.Module, options: argparse.Namespace) -> list[Batch]:
    """A fixed random draw of ``count`` labelled images."""
    loader = data.loader(
        data.open_split(data.DataSource(source=source), split),
        transform=transform_of(model),
        batch_size=options.batch,
        shuffle=True,
        seed=options.seed,
        num_classes=classes_of(model),
    )
    batches: list[Batch] = []
    for images, labels in loader:
        left = count - sum(len(held) for _, held in batches)
        if left <= 0:
            break
        batches.append((images[:left], labels[:left]))
    return batches


def leave_one_out(model: nn.Module, network: Network, batches: Sequence[Batch], options: argparse.Namespace) -> Truth:
    """Zero every head in turn; only the blocks from its own on are run again."""
    trunk = open_trunk(model, network, batches[0][0][:1])
    losses, divergences, right = [], [], 0
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
        for images, labels in batches:
            images, labels = images.to(options.device), labels.to(options.device)
            entries: dict[str, Tensor] = {}
            with observe_inputs(model, {name: partial(entries.__setitem__, name) for name in trunk.blocks}):
                dense = model(images).float().log_softmax(dim=-1)
            right += int((dense.argmax(dim=-1) == labels).sum())
            loss, divergence = [], []
            for sub in network.attentions:
                for head in range(sub.widths.heads):
                    cut = _run_without(trunk, sub, head, entries[sub.block]).float().log_softmax(dim=-1)
                    loss.append(F.nll_loss(cut, labels, reduction="none") - F.nll_loss(dense, labels, reduction="none"))
                    divergence.append((dense.exp() * (dense - cut)).sum(dim=-1))
            losses.append(torch.stack(loss, dim=1).cpu())
            divergences.append(torch.stack(divergence, dim=1).cpu())
    loss = torch.cat(losses).double()
    return Truth(loss=loss, divergence=torch.cat(divergences).double(), dense_top1=100 * right / len(loss))


def _run_without(trunk: Trunk, sub: Attention, head: int, x: Tensor) -> Tensor:
    """Logits from the input ``x`` of an attention's block on, with one of its heads silent."""
    units = slice(head * sub.widths.vo, (head + 1) * sub.widths.vo)
    vit: Any = trunk.model

    def silence(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        outputs = args[0].clone()
        outputs[..., units] = 0
        return outputs

    hook = vit.get_submodule(sub.readout.module).register_forward_pre_hook(silence)
    try:
        for index in range(trunk.blocks.index(sub.block), len(trunk.blocks)):
            x = trunk.run(index, x)
    finally:
        hook.remove()
    return vit.forward_head(vit.norm(x))


def labelled_changes(
    model: nn.Module, network: Network, batches: Sequence[Batch], options: argparse.Namespace
) -> Tensor:
    """First-order rise of each image's labelled loss when a head is zeroed ``[images, nodes]``: Taylor's baseline."""
    changes = []
    for images, labels in batches:
        outputs: dict[str, Tensor] = {}
        watch = {sub.name: sub.readout.module for sub in network.attentions}
        with observe_inputs(model, {name: partial(outputs.__setitem__, name) for name in watch.values()}):
            logits = model(images.to(options.device))
        loss = F.cross_entropy(logits, labels.to(options.device), reduction="sum")
        held = [outputs[name] for name in watch.values()]
        gradients = torch.autograd.grad(loss, held)
        by_block = [
            -(z * g).unflatten(-1, (sub.widths.heads, sub.widths.vo)).sum(dim=(1, 3))
            for sub, z, g in zip(network.attentions, held, gradients, strict=True)
        ]
        changes.append(torch.cat(by_block, dim=1).detach().double().cpu())
    return torch.cat(changes)


def baselines(model: nn.Module, network: Network, statistics: HeadStatistics, labelled: Tensor) -> dict[str, Tensor]:
    """Scores without a chain ``[nodes]``; those that read labels say so."""
    label_free = {f"{t} alone": head_values(model, network, statistics, t) for t in TELEPORTS if t != "uniform"}
    return label_free | {
        "labels: E|g.c|": labelled.abs().mean(dim=0),
        "labels: E[(g.c)^2]": labelled.square().mean(dim=0),
        "labels: E[g.c] + E[(g.c)^2] / 2": labelled.mean(dim=0) + labelled.square().mean(dim=0) / 2,
    }


def gathered(
    model: nn.Module,
    network: Network,
    images: Sequence[Tensor],
    edge: Edge,
    wanted: tuple[Statistic, ...] = STATISTICS,
) -> HeadStatistics:
    """Statistics of all heads in one graph."""
    fitter = HeadStatisticsFitter(model, network, scope="global", edge=edge, wanted=wanted)
    passes = differentiated(model, network, gohsp.classification(), images, draws=0, confidence=bool(wanted))
    for gradients in passes:
        fitter.update(gradients)
    return fitter.statistics


def in_scope(statistics: HeadStatistics, scope: Scope) -> HeadStatistics:
    """The layers' graphs are the diagonal blocks of the global one."""
    if scope == "global":
        return statistics
    heads = list(statistics.heads.values())
    ends = torch.tensor(heads).cumsum(0).tolist()
    nodes = [slice(end - count, end) for end, count in zip(ends, heads, strict=True)]
    return dataclasses.replace(statistics, edges=tuple(statistics.edges[0][s, s] for s in nodes))


def correlations(scores: Tensor, truths: dict[str, Truth]) -> dict[str, float]:
    """Spearman correlation with each truth; constant scores correlate with nothing."""
    found = {}
    for name, truth in truths.items():
        for target, values in truth.targets().items():
            constant = float(scores.max() - scores.min()) < 1e-12
            found[f"{name}_{target}"] = 0.0 if constant else float(spearmanr(scores, values).statistic)
    return found


def interval(scores: Tensor, truth: Truth, seed: int) -> list[float]:
    """95 % bootstrap interval, over the truth's images, of the correlation with the loss's rise."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(BOOTSTRAPS):
        chosen = torch.randint(len(truth.loss), (len(truth.loss),), generator=generator)
        draws.append(float(spearmanr(scores, truth.loss[chosen].mean(dim=0)).statistic))
    return torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()


def random_row(truths: dict[str, Truth], seed: int) -> dict[str, Any]:
    """Mean and spread over many random rankings."""
    generator = torch.Generator().manual_seed(seed)
    nodes = next(iter(truths.values())).loss.shape[1]
    rows = [correlations(torch.rand(nodes, generator=generator), truths) for _ in range(RANDOM_DRAWS)]
    draws = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    return {"name": "random", **{key: float(v.mean()) for key, v in draws.items()}} | {
        "standard_deviation": float(draws["evaluation_loss"].std())
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result file holds."""
    torch.manual_seed(options.seed)
    model = gohsp.open_model(options.model, weights=options.weights, pretrained=options.pretrained)
    model = model.to(options.device).eval()
    network = gohsp.describe(model)
    calibration = load_images(
        options.calibration, options.calibration_split, options.calibration_images, model, options
    )
    evaluation = load_images(options.evaluation, options.evaluation_split, options.images, model, options)
    say("zeroing heads one by one")
    truths = {
        "calibration": leave_one_out(model, network, calibration, options),
        "evaluation": leave_one_out(model, network, evaluation, options),
    }
    images = [batch for batch, _ in calibration]
    labelled = labelled_changes(model, network, calibration, options)
    rows: list[dict[str, Any]] = [random_row(truths, options.seed)]
    default = RankingSettings()
    say("gathering statistics")
    began = time.perf_counter()
    first = gathered(model, network, images, default.edge)
    seconds = time.perf_counter() - began
    for name, scores in baselines(model, network, first, labelled).items():
        found = correlations(scores, truths)
        rows.append({"name": name, **found, "interval": interval(scores, truths["evaluation"], options.seed)})
    for edge in EDGES:
        if edge == default.edge:
            edges = first.edges
        else:
            say(f"edges: {edge}")
            edges = gathered(model, network, images, edge, ()).edges
        statistics = dataclasses.replace(first, edges=edges)
        for scope, teleport, damping in product(SCOPES, TELEPORTS, DAMPINGS):
            settings = RankingSettings(edge=edge, scope=scope, damping=damping, teleport=teleport)
            values = head_values(model, network, statistics, teleport)
            ranking = rank(in_scope(statistics, scope), values, settings)
            scores = torch.tensor([s for of in ranking.scores.values() for s in of])
            row: dict[str, Any] = {"name": "chain", "edge": edge, "scope": scope, "damping": damping}
            row |= {"teleport": teleport, **correlations(scores, truths)}
            if settings == default:
                row |= {"default": True, "interval": interval(scores, truths["evaluation"], options.seed)}
                row["seconds"] = seconds
                row["scores"] = dict(ranking.scores)
            rows.append(row)
    return {
        **provenance(options),
        "dense_top1": {name: truth.dense_top1 for name, truth in truths.items()},
        "truth": {
            name: {key: values.tolist() for key, values in truth.targets().items()} for name, truth in truths.items()
        },
        "truths_agree": correlations(truths["calibration"].targets()["loss"], {"evaluation": truths["evaluation"]})
        | {
            "calibration_kl_with_evaluation_loss": correlations(
                truths["calibration"].targets()["kl"], {"evaluation": truths["evaluation"]}
            )["evaluation_loss"]
        },
        "rows": rows,
    }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to run it again; of absolute paths, the last part alone is kept."""
    return {
        "command": " ".join(["python", *(_portable(argument) for argument in sys.argv)]),
        "seed": options.seed,
        "model": options.model,
        "calibration": {
            "data": PurePath(options.calibration).name,
            "split": options.calibration_split,
            "images": options.calibration_images,
        },
        "evaluation": {
            "data": PurePath(options.evaluation).name,
            "split": options.evaluation_split,
            "images": options.images,
        },
        "bf16": options.bf16,
        "machine": machine(options.device),
        "versions": versions("scipy"),
    }


def _portable(argument: str) -> str:
    path = PurePath(argument.removeprefix("hfds/"))
    return path.name if path.is_absolute() else argument


def show(result: dict[str, Any]) -> None:
    """Print the rows: baselines, then the best damping of each chain by the calibration images, and the default."""
    keys = ("calibration_loss", "calibration_kl", "evaluation_loss", "evaluation_kl")
    chains: dict[tuple[str, str, str], dict[str, Any]] = {}
    shown = []
    for row in result["rows"]:
        if row["name"] != "chain":
            shown.append((row["name"], row))
            continue
        group = row["edge"], row["scope"], row["teleport"]
        if group not in chains or row["calibration_loss"] > chains[group]["calibration_loss"]:
            chains[group] = row
        if row.get("default"):
            shown.append(("default", row))
    shown += [(" ".join((*group, f"{row['damping']}")), row) for group, row in chains.items()]
    say(f"{'':40s}" + "".join(f"{key:>18s}" for key in keys))
    for name, row in shown:
        say(f"{name:40s}" + "".join(f"{row[key]:+18.3f}" for key in keys))


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__)
    arguments.add_argument("model", help="timm name or gohsp model folder")
    arguments.add_argument("--weights", type=Path, help="safetensors file with timm's key names")
    arguments.add_argument("--pretrained", action="store_true", help="fetch timm's own weights")
    arguments.add_argument("--calibration", required=True, help="images to rank on: hfds/..., a folder, wds/...")
    arguments.add_argument("--calibration-split", default="train")
    arguments.add_argument("--calibration-images", type=int, default=1000)
    arguments.add_argument("--evaluation", required=True, help="images to measure the truth on")
    arguments.add_argument("--evaluation-split", default="validation")
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--batch", type=int, default=50)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="for the truth alone")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    result = measure(options)
    show(result)
    if options.out:
        write_results(options.out, result)


if __name__ == "__main__":
    main()
