"""The same DeiT-Tiny as timm, transformers, torchvision and PyTorch hold it: what one-shot pruning leaves of each.

    pip install 'gohsp[hf,transformers]'
    GOHSP_ASSETS=../shared python benchmarks/layouts.py

The published weights are renamed into each library's model, whose outputs are checked to be timm's. Each is then pruned
by method ``oneshot`` to 4.0 M parameters on the same training images of imagenet-1k-mini, without labels. Top-1
is on the validation images of imagenet-1k-mini and imagenet-1k-broad, 2,278 together. A row that stands in the results
is not run again.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gohsp
from gohsp import Config
from shared import (
    RESULTS,
    asset,
    drawn,
    machine,
    parameters,
    parser,
    read_results,
    say,
    scores_on_both,
    sets_of_both,
    transform_of,
    versions,
    write_results,
)

BUDGET, DEPTH, DIM = "params=4.0M", 12, 192
State = Mapping[str, Tensor]


def as_timm(state: State) -> nn.Module:
    """The model that the weights are of."""
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(state)
    return model.eval()


def as_transformers(state: State) -> nn.Module:
    """Transformers' ``ViTForImageClassification``."""
    library: Any = importlib.import_module("transformers")
    config = library.ViTConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=4 * DIM,
        num_labels=1000,
        layer_norm_eps=1e-6,
    )
    renamed = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        **pair("vit.embeddings.patch_embeddings.projection", state, "patch_embed.proj"),
        **pair("vit.layernorm", state, "norm"),
        **pair("classifier", state, "head"),
    }
    for i in range(DEPTH):
        mine, theirs = f"vit.layers.{i}", f"blocks.{i}"
        for name, part in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
            renamed |= pair(f"{mine}.{name}", state, f"{theirs}.{part}")
        for kind in ("weight", "bias"):
            q, k, v = state[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            renamed |= {f"{mine}.attention.{x}_proj.{kind}": part for x, part in zip("qkv", (q, k, v), strict=True)}
        renamed |= pair(f"{mine}.attention.o_proj", state, f"{theirs}.attn.proj")
        for layer in ("fc1", "fc2"):
            renamed |= pair(f"{mine}.mlp.{layer}", state, f"{theirs}.mlp.{layer}")
    model = library.ViTForImageClassification(config)
    model.load_state_dict(renamed)
    return model.eval()


def as_torchvision(state: State) -> nn.Module:
    """Torchvision's ``VisionTransformer``."""
    library: Any = importlib.import_module("torchvision.models.vision_transformer")
    model = library.VisionTransformer(224, 16, DEPTH, 3, DIM, 4 * DIM, num_classes=1000)
    renamed = {
        "class_token": state["cls_token"],
        "encoder.pos_embedding": state["pos_embed"],
        **pair("conv_proj", state, "patch_embed.proj"),
        **pair("encoder.ln", state, "norm"),
        **pair("heads.head", state, "head"),
    }
    for i in range(DEPTH):
        mine, theirs = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
        renamed |= pair(f"{mine}.ln_1", state, f"{theirs}.norm1") | pair(f"{mine}.ln_2", state, f"{theirs}.norm2")
        renamed |= packed(f"{mine}.self_attention", state, theirs)
        renamed |= pair(f"{mine}.mlp.0", state, f"{theirs}.mlp.fc1") | pair(f"{mine}.mlp.3", state, f"{theirs}.mlp.fc2")
    model.load_state_dict(renamed)
    return model.eval()


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` in a module of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.num_classes = nn.Conv2d(3, DIM, 16, 16), 1000
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, 197, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, 3, 4 * DIM, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(DIM, eps=1e-6), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits ``[B, 1000]``."""
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.encoder(x)[:, 0])


def as_torch(state: State) -> nn.Module:
    """PyTorch's own layers."""
    renamed = {
        "token": state["cls_token"],
        "position": state["pos_embed"],
        **pair("patch", state, "patch_embed.proj"),
        **pair("encoder.norm", state, "norm"),
        **pair("head", state, "head"),
    }
    for i in range(DEPTH):
        mine, theirs = f"encoder.layers.{i}", f"blocks.{i}"
        renamed |= pair(f"{mine}.norm1", state, f"{theirs}.norm1") | pair(f"{mine}.norm2", state, f"{theirs}.norm2")
        renamed |= packed(f"{mine}.self_attn", state, theirs)
        renamed |= pair(f"{mine}.linear1", state, f"{theirs}.mlp.fc1")
        renamed |= pair(f"{mine}.linear2", state, f"{theirs}.mlp.fc2")
    model = Encoder()
    model.load_state_dict(renamed)
    return model.eval()


def pair(name: str, state: State, of: str) -> dict[str, Tensor]:
    """A weight and a bias under another name."""
    return {f"{name}.{kind}": state[f"{of}.{kind}"] for kind in ("weight", "bias")}


def packed(name: str, state: State, block: str) -> dict[str, Tensor]:
    """What ``nn.MultiheadAttention`` holds."""
    return {
        f"{name}.in_proj_weight": state[f"{block}.attn.qkv.weight"],
        f"{name}.in_proj_bias": state[f"{block}.attn.qkv.bias"],
        **pair(f"{name}.out_proj", state, f"{block}.attn.proj"),
    }


LAYOUTS: Mapping[str, Callable[[State], nn.Module]] = {
    "timm": as_timm,
    "transformers": as_transformers,
    "torchvision": as_torchvision,
    "torch": as_torch,
}


class Logits(nn.Module):
    """Class logits of a model, whatever it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``[B, classes]``."""
        returned: Any = self.model(images)
        return getattr(returned, "logits", returned)


def difference(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """Largest difference of two models' logits, over the reference's largest."""
    with torch.no_grad():
        expected = Logits(reference)(images)
        return float((Logits(model)(images) - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Prune and score each, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    arguments.add_argument("--images", type=int, default=1000, help="to calibrate on")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--results", type=Path, default=RESULTS / "layouts.json")
    options = arguments.parse_args()
    state = load_file(asset("models/deit_tiny_patch16_224.safetensors"))
    reference = as_timm(state)
    images = drawn(f"hfds/{asset('data/imagenet-1k-mini')}", options.images, transform_of(reference), seed=options.seed)
    header = {
        "machine": machine(),
        "versions": versions("transformers", "torchvision"),
        "seed": options.seed,
        "images": options.images,
    }
    results = read_results(options.results, {**header, "runs": {}})
    if {name: results[name] for name in header} != header:
        sys.exit(f"{options.results} is of another machine, version or setting; give another file with --results")
    config, held = Config(seed=options.seed), -(-options.images // 20)
    counts = replace(config.calibration, images=options.images - held, holdout=held)
    config = replace(config, calibration=counts)
    for name in options.layouts:
        if name in results["runs"]:
            continue
        model, began = LAYOUTS[name](state), time.perf_counter()
        pruned = gohsp.prune(model, images, BUDGET, config=config)
        found = {
            "dense_difference": difference(model, reference, images[0][:8]),
            "params": parameters(pruned.model),
            "divergence": pruned.fidelity.distance,
            "seconds": round(time.perf_counter() - began, 1),
            "top1": scores_on_both(Logits(pruned.model), sets_of_both(reference)),
        }
        results["runs"][name] = found
        write_results(options.results, results)
        say(f"{name}: {found}")


if __name__ == "__main__":
    main()
