"""Models that could not be loaded again, and folders that are not what gohsp wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import gohsp
from gohsp.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from refusals import Refusal

TITLE = "Model folders"

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}

ATTENTION = {"heads": 4, "qk": 8, "vo": 8}
MIXED_UP = {f"blocks.{block}.{name}": ATTENTION for block in (0, 1) for name in ("attn", "mlp")}


def of_a_file(folder: Path) -> object:
    (folder / "x.pth").touch()
    return gohsp.load(folder / "x.pth")


def tiny() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY)


def saving(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Save a tiny model after a change."""

    def act(folder: Path) -> None:
        model = tiny()
        change(model)
        gohsp.save(model, folder / "model")

    return act


def loading(**changes: Any) -> Callable[[Path], object]:
    """Load a tiny model's folder whose ``config.json`` was changed."""

    def act(folder: Path) -> None:
        gohsp.save(tiny(), folder / "model")
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        gohsp.load(folder / "model")

    return act


def loading_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Load a tiny model's folder whose tensors were changed."""

    def act(folder: Path) -> None:
        gohsp.save(tiny(), folder / "model")
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        gohsp.load(folder / "model")

    return act


class Scaled(nn.Module):
    """An activation of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x.relu()


def _own_activation(model: Any) -> None:
    model.blocks[1].mlp.act = Scaled()


def _head_of_layers(model: Any) -> None:
    model.head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))


def _further_module(model: Any) -> None:
    model.adapter = nn.Linear(4, 4)


def _tied(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _integers(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.ones(5, 32, dtype=torch.int8), requires_grad=False)


def _quantised(model: Any) -> None:
    model.head.weight = nn.Parameter(TwoTensor(model.head.weight.detach(), model.head.weight.detach()))


def _half_of_it(model: Any) -> None:
    model.blocks[0].half()


def _no_number(model: Any) -> None:
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")


def _own(folder: Path) -> None:
    gohsp.save(timm.models.VisionTransformer(**TINY), folder / "model")
    gohsp.load(folder / "model")


def _differing(folder: Path) -> None:
    model = tiny()
    gohsp.models.resize(model, {**gohsp.describe(model).widths, "blocks.0.mlp": gohsp.FfnWidths(units=8)})
    gohsp.save_plain(model, folder / "model")


def _into_another(folder: Path) -> None:
    gohsp.save(tiny(), folder / "model")
    gohsp.load(folder / "model", into=timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 3}))


CASES = (
    Refusal("a file in place of a folder to load", of_a_file, CheckpointError, "gohsp.open_model(name, weights=...)"),
    Refusal("saving a model with an activation of one's own", saving(_own_activation), UnsupportedModelError, "Scaled"),
    Refusal("saving a model with a head of several layers", saving(_head_of_layers), UnsupportedModelError, "head.0"),
    Refusal("saving a model with a further module", saving(_further_module), UnsupportedModelError, "adapter.weight"),
    Refusal("saving a model with tied weights", saving(_tied), UnsupportedModelError, "is the same parameter as"),
    Refusal("saving a model with integer weights", saving(_integers), UnsupportedModelError, "Float and Char"),
    Refusal("saving a model with quantised weights", saving(_quantised), UnsupportedModelError, "quantise or shard it"),
    Refusal("saving a model of mixed precisions", saving(_half_of_it), UnsupportedModelError, "several types"),
    Refusal("saving a weight that is not finite", saving(_no_number), NonFiniteError, "head.weight"),
    Refusal("saving for its library a model whose blocks differ", _differing, UnsupportedModelError,
            "'blocks.0.mlp.fc1.weight' is"),
    Refusal("saving for its library a module of one's own",
            lambda folder: gohsp.save_plain(timm.models.VisionTransformer(**TINY), folder), UnsupportedModelError,
            "is no model of timm, torchvision, transformers"),
    Refusal("a config that names a checkpoint to read", loading(arguments={"checkpoint_path": "x.pth"}),
            CheckpointError, "'checkpoint_path' is no argument"),
    Refusal("a config that asks for pretrained weights", loading(arguments={"pretrained": True}),
            CheckpointError, "'pretrained' is no argument"),
    Refusal("a config that names an address", loading(arguments={"pretrained_cfg": {"url": "http://localhost/x"}}),
            CheckpointError, "'pretrained_cfg' is no argument"),
    Refusal("a config with a hub's model in place of an architecture", loading(architecture="hf-hub:a/b"),
            CheckpointError, "'architecture' is 'hf-hub:a/b'"),
    Refusal("a config with a library and no architecture", loading(architecture=None),
            CheckpointError, "library and architecture must both be there"),
    Refusal("a config with another architecture", loading(architecture="resnet18"), CheckpointError, "is none of timm"),
    Refusal("a config that is far too deep", loading(arguments={**TINY, "depth": 10**6}), CheckpointError, "0 to 512"),
    Refusal("a config deeper than its weights", loading(arguments={**TINY, "depth": 300}), CheckpointError, "2 blocks"),
    Refusal("a config with preprocessing that is no table", loading(preprocessing=[1]), CheckpointError, "preproc"),
    Refusal("a config with a width of 10^30", loading(widths={"blocks.0.mlp": {"units": 10**30}}),
            CheckpointError, "widths.blocks.0.mlp.units"),
    Refusal("a config of the first edition with a width of 10^30",
            loading(format_version=1, widths=[{"heads": 1, "qk": 8, "vo": 8, "ffn": 10**30}] * 2),
            CheckpointError, "widths.blocks.0.mlp.units"),
    Refusal("a config with the widths of another network", loading(widths={"layers.0": {"units": 8}}),
            CheckpointError, "widths"),
    Refusal("a config with an attention's widths for an FFN", loading(widths=MIXED_UP), CheckpointError,
            "has AttentionWidths, the architecture FfnWidths"),
    Refusal("a config of the next edition", loading(format_version=3), CheckpointError, "update gohsp"),
    Refusal("a config with an unknown entry", loading(hook="os.system"), CheckpointError, "'hook' is unknown"),
    Refusal("weights with integer tensors", loading_tensors(lambda t: t.update(x=torch.ones(2, dtype=torch.int64))),
            CheckpointError, "I64"),
    Refusal("weights with a tensor missing", loading_tensors(lambda t: t.pop("head.bias")),
            CheckpointError, "'head.bias' is missing"),
    Refusal("weights that are not finite", loading_tensors(lambda t: t["head.bias"].fill_(float("inf"))),
            NonFiniteError, "head.bias"),
    Refusal("a folder without a config", gohsp.load, CheckpointError, "holds no config.json"),
    Refusal("the folder of a module of one's own, loaded without one", _own, CheckpointError, "into=module"),
    Refusal("the folder of one module, loaded into another", _into_another, CheckpointError, "does not fit the model"),
)  # fmt: skip
