"""Torch-Pruning and gohsp's method oneshot on DeiT-Tiny: top-1 at a budget of parameters, no training afterwards.

    pip install 'gohsp[hf,bench]'
    python benchmarks/peers.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini --params 4.0M

A method is ``importance/scope/width``, chosen with ``--methods`` by name or pattern (``'taylor/*/blocks'``):

- importance: ``l2``, ``taylor`` or ``hessian``, each over Torch-Pruning's groups of coupled weights;
- scope: ``uniform`` cuts every layer by the same ratio; ``isomorphic`` ranks layers of the same pattern together;
  ``isomorphic-raw`` does so without dividing each layer's scores by their mean first, which is Torch-Pruning's
  default;
- width: what may be cut besides the hidden units of the FFN. ``all``: embedding and head dimensions, as its example
  for timm does; ``deit``: whole heads as well, as the scripts of Isomorphic Pruning do; ``blocks``: head dimensions;
  ``heads``: whole heads; ``ffn``: nothing.

The images that gohsp calibrates with give the gradients, with their labels, which gohsp does not read. One ratio for
everything is searched for the most parameters within the budget. Top-1 is on the validation split. Results are written
after each record; one that is there already is not run again.

Mended in Torch-Pruning's favour: the numbers of heads and dimensions that timm's attention keeps are updated; the
scale of the attention is the better of the dense model's and the one of the pruned dimension; Hessian scores average
the squared gradients of all images, where ``GroupHessianImportance.accumulate_grad`` keeps those of the last one only.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from timm.layers import Attention
from torch import Tensor, nn

import gohsp
from gohsp import data
from gohsp.evaluation import evaluate
from gohsp.structure import parse_budget
from oneshot import add_arguments, run_case
from shared import (
    RESULTS,
    data_name,
    machine,
    macs,
    parameters,
    parser,
    read_results,
    say,
    transform_of,
    versions,
    write_results,
)

IMPORTANCES = ("l2", "taylor", "hessian")
SCOPES = ("uniform", "isomorphic", "isomorphic-raw")
WIDTHS = ("all", "deit", "blocks", "heads", "ffn")
METHODS = tuple("/".join(parts) for parts in itertools.product(IMPORTANCES, SCOPES, WIDTHS))
SEARCH_STEPS = 14
NOTES = {
    "macs": "matrix products and convolutions an image, as gohsp counts them (torch's FlopCounterMode, halved)",
    "seconds": "gradients (shared by an importance's methods, counted in each) and search of the ratio; no scoring",
    "top1_by_scale": "attention scale of the dense model's head dimension (dense) or the pruned (pruned); top1: better",
}

Batches = Sequence[tuple[Tensor, Tensor]]


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules of a timm model."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def labelled_images(source: data.DataSource, count: int, seed: int, transform: data.Transform) -> list[Any]:
    """The batches that `gohsp.data.calibration_images` draws, with their labels."""
    split = data.open_split(source, "train")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    labels = torch.from_numpy(split.labels())
    return [(torch.stack([transform(split.image(int(i))) for i in part]), labels[part]) for part in order.split(64)]


def gradients(model: nn.Module, batches: Batches, importance: str) -> tuple[dict[str, Tensor], float]:
    """What an importance takes for gradients, by parameter, and the seconds it took.

    For ``taylor`` the sum of the batches' gradients, for ``hessian`` the mean of the images' squared gradients.
    """
    began = time.perf_counter()
    if importance == "l2":
        return {}, 0.0
    size = 1 if importance == "hessian" else 64
    pairs = [pair for x, y in batches for pair in zip(x.split(size), y.split(size), strict=True)]
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for x, y in pairs:
        found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for kept, gradient in zip(total.values(), found, strict=True):
            kept += gradient.square() / len(pairs) if importance == "hessian" else gradient
    return total, time.perf_counter() - began


def scorer(importance: str, scope: str) -> Any:
    """Torch-Pruning's importance."""
    normalizer = None if scope.endswith("raw") else "mean"
    if importance == "l2":
        return tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    if importance == "taylor":
        return tp.importance.GroupTaylorImportance(normalizer=normalizer)
    return tp.importance.GroupHessianImportance(normalizer=normalizer)


def ignored_layers(model: nn.Module, width: str) -> list[Any]:
    """The layers whose outputs stay: one of the residual stream's layers protects all of it."""
    blocks: Any = model.blocks
    ignored: list[Any] = [model.head]
    if width not in ("all", "deit"):
        ignored += [block.mlp.fc2 for block in blocks]
    if width == "ffn":
        ignored += [block.attn.qkv for block in blocks]
    return ignored


def prune(dense: nn.Module, grads: Mapping[str, Tensor], method: str, ratio: float, example: Tensor) -> nn.Module:
    """Prune a copy of the dense model by a ratio."""
    importance, scope, width = method.split("/")
    model: Any = copy.deepcopy(dense)
    for name, gradient in grads.items():
        model.get_parameter(name).grad = gradient.clone()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=scorer(importance, scope),
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        global_pruning=scope != "uniform",
        isomorphic=scope != "uniform",
        ignored_layers=ignored_layers(model, width),
        num_heads={attention.qkv: attention.num_heads for attention in attentions(model)},
        prune_num_heads=width in ("deit", "heads"),
        prune_head_dims=width != "heads",
        unwrapped_parameters=[(model.cls_token, 2), (model.pos_embed, 2)],
        in_channel_groups={},  # the defaults are shared by all pruners
        out_channel_groups={},
    )
    pruner.step()
    for attention in attentions(model):
        # A cut that would take every head is not made, yet counted.
        attention.num_heads = pruner.num_heads[attention.qkv] or attention.num_heads
        attention.attn_dim = attention.proj.in_features
        attention.head_dim = attention.attn_dim // attention.num_heads
    return model.requires_grad_(False)


def prune_to(
    dense: nn.Module, grads: Mapping[str, Tensor], method: str, limit: int, example: Tensor
) -> tuple[nn.Module, float]:
    """Bisect the ratio; returns the largest model of at most ``limit`` parameters, and its ratio."""
    low, high = 0.0, 1.0
    best: tuple[int, nn.Module, float] | None = None
    for _ in range(SEARCH_STEPS):
        ratio = (low + high) / 2
        model = prune(dense, grads, method, ratio, example)
        count = parameters(model)
        if count > limit:
            low = ratio
            continue
        high = ratio
        if best is None or count > best[0]:
            best = count, model, ratio
    if best is None:
        raise ValueError(f"{method} cannot reach {limit:,} parameters")
    return best[1], best[2]


def score(model: nn.Module, batches: Any) -> dict[str, float]:
    """Top-1 by the attention's scale."""
    top1 = {"dense": evaluate(model, batches).top1}
    dense = [attention.scale for attention in attentions(model)]
    pruned = [attention.head_dim**-0.5 for attention in attentions(model)]
    if pruned != dense:
        for attention, scale in zip(attentions(model), pruned, strict=True):
            attention.scale = scale
        top1["pruned"] = evaluate(model, batches).top1
    return top1


def peer_record(
    dense: nn.Module, grads: tuple[dict[str, Tensor], float], method: str, limit: int, validation: Any, example: Tensor
) -> dict[str, Any]:
    """Prune to ``limit`` parameters by one of Torch-Pruning's methods, and score."""
    began = time.perf_counter()
    try:
        model, ratio = prune_to(dense, grads[0], method, limit, example)
    except ValueError as error:
        return {"failed": str(error)}
    seconds = grads[1] + time.perf_counter() - began
    importance, scope, width = method.split("/")
    settings = {"importance": importance, "scope": scope, "width": width, "ratio": round(ratio, 5)}
    top1 = score(model, validation)
    count = parameters(model)
    record: dict[str, Any] = {
        "top1": max(top1.values()),
        "params": count,
        "macs": macs(model, example),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "settings": settings,
        "top1_by_scale": top1,
    }
    if count < 0.99 * limit:
        record["note"] = f"{100 * (1 - count / limit):.1f} % under the budget: no ratio comes nearer"
    return record


def gohsp_record(options: argparse.Namespace, budget: str) -> dict[str, Any]:
    """The row of gohsp itself, by its command line."""
    with tempfile.TemporaryDirectory() as folder:
        record = run_case(options, f"params={budget}", options.seed, options.images, Path(folder))
    kept = ("top1", "params", "macs", "seconds", "peak_memory_mib", "fidelity")
    return {key: record[key] for key in kept} | {"settings": {"method": "oneshot", "flags": record["flags"]}}


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What all records of a results file have in common."""
    return {
        "command": f"python benchmarks/peers.py --weights {options.weights.name} --data {data_name(options.data)}",
        "seed": options.seed,
        "images": options.images,
        "machine": machine(),
        "versions": versions("torchvision", "numpy", "torch-pruning"),
        "notes": NOTES,
    }


def save(options: argparse.Namespace, results: dict[str, Any], key: str, record: dict[str, Any]) -> None:
    """Add a record, write the results, say so."""
    results["runs"][key] = record
    write_results(options.results, results)
    text = record.get("failed") or f"{record['params']:,} parameters, top-1 {record['top1']:.1f} %"
    say(f"{key}: {text}")


def main() -> None:
    """Run what is not in the results yet."""
    arguments = parser(__doc__)
    add_arguments(arguments)
    arguments.add_argument("--params", nargs="+", required=True, help="budgets, such as 4.0M")
    arguments.add_argument("--methods", nargs="+", default=["*"], help="names or patterns of importance/scope/width")
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--skip-gohsp", action="store_true")
    arguments.add_argument("--results", type=Path, default=RESULTS / "peers_deit_tiny.json")
    options = arguments.parse_args()
    results = read_results(options.results, {"runs": {}})
    if results["runs"] and {key: results.get(key) for key in header(options)} != header(options):
        sys.exit(f"{options.results} is of another seed, machine or version; give another file with --results")
    results = {**header(options), "runs": results["runs"]}
    if not options.skip_gohsp:
        for budget in options.params:
            key = " ".join(["gohsp", f"params={budget}", *options.flags])
            if key not in results["runs"]:
                save(options, results, key, gohsp_record(options, budget))

    dense = gohsp.open_model(options.model, weights=options.weights)
    for attention in attentions(dense):
        attention.fused_attn = False  # torch's own kernel would take the scale of the pruned dimension
    source = data.DataSource(source=options.data)
    transform = transform_of(dense)
    images = labelled_images(source, options.images, options.seed, transform)
    split = data.open_split(source, "validation")
    validation = data.loader(split, transform=transform, batch_size=64, shuffle=False)
    methods = [m for m in METHODS if any(fnmatch.fnmatchcase(m, pattern) for pattern in options.methods)]
    for importance in IMPORTANCES:
        wanted = [
            (f"{method} params={budget}", method, budget)
            for budget in options.params
            for method in methods
            if method.startswith(importance) and f"{method} params={budget}" not in results["runs"]
        ]
        grads = gradients(dense, images, importance) if wanted else ({}, 0.0)
        for key, method, budget in wanted:
            limit = int(parse_budget(f"params={budget}").limit(parameters(dense)))
            save(options, results, key, peer_record(dense, grads, method, limit, validation, images[0][0][:1]))


if __name__ == "__main__":
    main()
