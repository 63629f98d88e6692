"""A module of somebody's own, a ViT-S/14 with a decoder: how far its saliency maps move when the backbone is cut.

    pip install 'gohsp[hf,bench]'
    GOHSP_ASSETS=../shared python benchmarks/saliency.py

The module and its weights are assets; without them the script says so and ends. Photographs of the training split of
imagenet-1k-mini calibrate, others of it are compared on: the mean absolute difference of the pruned model's maps from
the dense one's, and the intersection over union of both where maps are above a half. Nothing is trained, and no label
is read. At each budget, given in parameters of the whole module:

- ``gohsp``: method ``oneshot`` by damage curves; ``uniform``: the same share of every width, units of least weight
  norm, no repair;
- ``tp l2``, ``tp fpgm``, ``tp taylor``: Torch-Pruning, heads' dimensions and hidden units of the backbone alone, cut to
  as many parameters within 1 %. Taylor's gradients are those of the maps' sum of squares on the calibration
  photographs, as there are no labels. ``best`` names the one whose maps differ least.

With ``--backbone transformers`` the backbone is transformers' ``Dinov2Model`` with the same weights under its own
names, and gohsp's rows alone are made; the maps before pruning are checked to be the same.

A method that stands in the results is not run again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import gohsp
from gohsp import Config, data
from gohsp.structure import bound_for, parse_budget
from layouts import pair
from peers import SEARCH_STEPS, attentions
from shared import (
    RESULTS,
    asset,
    drawn,
    even_widths,
    machine,
    parameters,
    parser,
    read_results,
    say,
    versions,
    write_results,
)

BUDGETS = ("params=-30%", "params=-50%")
CRITERIA = ("l2", "fpgm", "taylor")
METHODS = ("gohsp", "uniform", *(f"tp {name}" for name in CRITERIA))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels."""

NEAR = 0.01
"""Share of the parameters by which Torch-Pruning may miss them."""

SAME = 1e-4
"""How far the maps of both layouts may be apart before pruning."""

BACKBONES = {"timm": METHODS, "transformers": METHODS[:2]}
"""Whose the backbone may be, and the methods that take it: Torch-Pruning is told of timm's parts."""


def opened() -> nn.Module:
    """The module, made by the code that lies with its weights."""
    weights, code = asset("models/saliency_vit_small_patch14.safetensors"), asset("models/saliency_vit.py")
    spec = importlib.util.spec_from_file_location("saliency_vit", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(weights)


class OfTransformers(nn.Module):
    """The module with its backbone in transformers' layout."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.backbone, self.decoder = as_dinov2(like.backbone), like.decoder

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[B, 1, H, W]``."""
        tokens = self.backbone(images).last_hidden_state[:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        found = self.decoder(tokens.mT.unflatten(2, (side, side)))
        return F.interpolate(found, size=images.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


def as_dinov2(vit: Any) -> nn.Module:
    """Transformers' ``Dinov2Model`` with the weights of timm's ViT of that layout."""
    library: Any = importlib.import_module("transformers")
    config = library.Dinov2Config(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        layer_norm_eps=vit.norm.eps,
        use_mask_token=False,
    )
    state = vit.state_dict()
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        **pair("embeddings.patch_embeddings.projection", state, "patch_embed.proj"),
        **pair("layernorm", state, "norm"),
    }
    for i in range(len(vit.blocks)):
        mine, theirs = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            q, k, v = state[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            renamed |= {f"{mine}.attention.{x}_proj.{kind}": part for x, part in zip("qkv", (q, k, v), strict=True)}
        renamed |= pair(f"{mine}.attention.o_proj", state, f"{theirs}.attn.proj")
        for number in (1, 2):
            renamed |= pair(f"{mine}.norm{number}", state, f"{theirs}.norm{number}")
            renamed |= pair(f"{mine}.mlp.fc{number}", state, f"{theirs}.mlp.fc{number}")
            renamed[f"{mine}.layer_scale{number}.lambda1"] = state[f"{theirs}.ls{number}.gamma"]
    model = library.Dinov2Model(config)
    model.load_state_dict(renamed)
    return model


@torch.no_grad()
def maps(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Saliency maps ``[N, 1, H, W]``."""
    return torch.cat([model.eval()(batch) for batch in images])


def compared(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """How far maps are apart; two maps that are empty above a half overlap altogether."""
    a, b = dense > 0.5, pruned > 0.5
    union = (a | b).flatten(1).sum(1)
    overlap = torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp_min(1), 1.0)
    return {
        "difference": round(float((dense - pruned).abs().mean()), 5),
        "iou": round(float(overlap.mean()), 4),
    }


def by_gohsp(dense: nn.Module, images: Sequence[Tensor], budget: str) -> nn.Module:
    """Method oneshot."""
    count = sum(map(len, images))
    held = -(-count // 20)
    config = Config()
    calibration = replace(config.calibration, images=count - held, holdout=held)
    return gohsp.prune(dense, images, budget, config=replace(config, calibration=calibration)).model


def by_norms(dense: nn.Module, images: Sequence[Tensor], budget: str) -> nn.Module:
    """Even widths, the units of least weight norm gone, nothing repaired."""
    work, repair = copy.deepcopy(dense), replace(Config().repair, guidance=0)
    network = gohsp.describe(work, images[0][:1])
    widths = even_widths(network, budget)
    settings = gohsp.AdmmSettings(metric="norm")
    moments = gohsp.collect_moments(work, network, [images[0][:2]])  # which norms do not read
    state = gohsp.admm.start(work, network, widths, moments, None, settings, repair=repair)
    return gohsp.compact(work, gohsp.admm.finish(state), images[0][:2]).model


def by_torch_pruning(dense: nn.Module, images: Sequence[Tensor], budget: str, criterion: str) -> nn.Module:
    """The backbone cut at the ratio that comes nearest to the budget from below.

    Raises:
        ValueError: No ratio comes within 1 % of it.
    """
    work = copy.deepcopy(dense).eval()
    for attention in attentions(work):
        attention.fused_attn = False
    if criterion == "taylor":
        for batch in images:
            (work(batch).square().sum() / sum(map(len, images))).backward()
    limit = bound_for(gohsp.describe(dense, images[0][:1]), parse_budget(budget)).limit
    low, high, best = 0.0, 1.0, None
    for _ in range(SEARCH_STEPS):
        ratio = (low + high) / 2
        model = cut_at(work, criterion, ratio, images[0][:1])
        if parameters(model) > limit:
            low = ratio
            continue
        high = ratio
        if best is None or parameters(model) > parameters(best):
            best = model
    if best is None or parameters(best) < (1 - NEAR) * limit:
        raise ValueError(f"no ratio comes within {100 * NEAR:.0f} % of {limit:,.0f} parameters")
    return best


def cut_at(dense: nn.Module, criterion: str, ratio: float, example: Tensor) -> nn.Module:
    """A copy of the module with its backbone cut by a ratio; the residual stream, and so the decoder, stays."""
    model: Any = copy.deepcopy(dense)
    for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()  # a copy has none
    importance: dict[str, Callable[[], Any]] = {
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "fpgm": lambda: tp.importance.FPGMImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }
    backbone = model.backbone
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance[criterion](),
        pruning_ratio=ratio,
        ignored_layers=[*(block.mlp.fc2 for block in backbone.blocks), model.decoder],
        num_heads={attention.qkv: attention.num_heads for attention in attentions(model)},
        prune_head_dims=True,
        unwrapped_parameters=[
            *((backbone.get_parameter(name), 2) for name in ("cls_token", "pos_embed")),
            *((scale.gamma, 0) for block in backbone.blocks for scale in (block.ls1, block.ls2)),
        ],
        in_channel_groups={},  # the defaults are shared by all pruners
        out_channel_groups={},
    )
    pruner.step()
    for attention in attentions(model):
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.proj.in_features
        attention.head_dim = attention.attn_dim // attention.num_heads
        attention.scale = attention.head_dim**-0.5
    return model.requires_grad_(False)


def pruned_by(method: str, dense: nn.Module, images: Sequence[Tensor], budget: str) -> nn.Module:
    """A method's model."""
    if method == "gohsp":
        return by_gohsp(dense, images, budget)
    if method == "uniform":
        return by_norms(dense, images, budget)
    return by_torch_pruning(dense, images, budget, method.removeprefix("tp "))


def best_of(runs: dict[str, Any], budget: str) -> str | None:
    """The criterion of Torch-Pruning whose maps differ least."""
    found = {m: runs[f"{m} {budget}"] for m in METHODS if m.startswith("tp ") and f"{m} {budget}" in runs}
    measured = {method: run["difference"] for method, run in found.items() if "difference" in run}
    return min(measured, key=measured.__getitem__) if measured else None


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "command": f"python benchmarks/saliency.py --images {options.images} --others {options.others} "
        f"--seed {options.seed}" + ("" if options.backbone == "timm" else f" --backbone {options.backbone}"),
        "machine": machine(),
        "versions": versions("torch-pruning" if options.backbone == "timm" else options.backbone),
    }


def main() -> None:
    """Run every method at every budget, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--budgets", nargs="+", default=BUDGETS)
    arguments.add_argument("--backbone", choices=BACKBONES, default="timm", help="whose code it is")
    arguments.add_argument("--methods", nargs="+", choices=METHODS, help="by default all that take the backbone")
    arguments.add_argument("--images", type=int, default=200, help="to calibrate on")
    arguments.add_argument("--others", type=int, default=200, help="to compare on")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--results", type=Path, help="by default saliency.json or, of transformers, its namesake")
    options = arguments.parse_args()
    methods = options.methods or BACKBONES[options.backbone]
    if others := set(methods) - set(BACKBONES[options.backbone]):
        arguments.error(f"{sorted(others)} take a backbone of timm's")
    name = "saliency.json" if options.backbone == "timm" else f"saliency_{options.backbone}.json"
    options.results = options.results or RESULTS / name
    source, dense = f"hfds/{asset('data/imagenet-1k-mini')}", opened()
    preprocessing = data.Preprocessing(
        image_size=224, channels=3, mean=MEAN, std=STD, crop_pct=1.0, interpolation="bicubic"
    )
    transform = data.eval_transform(preprocessing)
    images = drawn(source, options.images, transform, seed=options.seed)
    others = drawn(source, options.others, transform, seed=options.seed, skip=options.images)
    results = read_results(options.results, {**header(options), "runs": {}})
    if results["command"] != header(options)["command"]:
        sys.exit(f"{options.results} is of other images; give another file with --results")
    expected = maps(dense, others)
    if options.backbone == "transformers":
        dense = OfTransformers(dense).eval()
        apart = float((maps(dense, others) - expected).abs().max())
        if apart > SAME:
            sys.exit(f"the maps of both layouts differ by up to {apart:.1e} before pruning")
        results["dense_difference"] = apart
    results["params"] = parameters(dense)
    for budget in options.budgets:
        for method in methods:
            key = f"{method} {budget}"
            if key in results["runs"]:
                continue
            began = time.perf_counter()
            try:
                model = pruned_by(method, dense, images, budget)
            except ValueError as error:
                results["runs"][key] = {"failed": str(error)}
            else:
                seconds = round(time.perf_counter() - began, 1)
                found = compared(expected, maps(model, others))
                results["runs"][key] = {"params": parameters(model), **found, "seconds": seconds}
            results["best"] = {b: best_of(results["runs"], b) for b in options.budgets}
            write_results(options.results, results)
            say(f"{key}: {results['runs'][key]}")


if __name__ == "__main__":
    main()
