"""Names, arguments, weights files and modules that no model can be opened or pruned from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import gohsp
from gohsp.errors import CheckpointError, NonFiniteError, PlanError, RunError, UnsupportedModelError
from refusals import Refusal

TITLE = "Opening a model"

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
VIT = {"architectures": ["ViTModel"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
       "intermediate_size": 32, "image_size": 32}  # fmt: skip
BATCHED = {"norm.weight": torch.ones(2)}
Act = Callable[[Path], object]


def tiny(name: str = NAME, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **arguments})


def opened(name: Any, **options: Any) -> Act:
    return lambda _: gohsp.open_model(name, **options)


def offline(name: str) -> Act:
    """Ask for pretrained weights where the hub cannot be reached."""

    def act(folder: Path) -> None:
        constants = "huggingface_hub.constants"
        with patch(f"{constants}.HF_HUB_OFFLINE", True), patch(f"{constants}.HF_HUB_CACHE", str(folder)):
            gohsp.open_model(name, pretrained=True)

    return act


def with_arguments(**arguments: Any) -> Act:
    return opened(NAME, arguments=arguments)


def with_weights(change: Callable[[dict[str, torch.Tensor]], object], **arguments: Any) -> Act:
    """Open a tiny model with the weights of another one, changed."""

    def act(folder: Path) -> None:
        state = tiny().state_dict()
        change(state)
        save_file(state, folder / "w.safetensors")
        gohsp.open_model(NAME, weights=folder / "w.safetensors", arguments={**TINY, **arguments})

    return act


def with_file(name: str, content: bytes | None) -> Act:
    """Open a tiny model with a weights file of these bytes."""

    def act(folder: Path) -> None:
        if content is not None:
            (folder / name).write_bytes(content)
        gohsp.open_model(NAME, weights=folder / name, arguments=TINY)

    return act


def with_pickle(content: Any) -> Act:
    """Open a tiny model with a weights file that ``torch.save`` wrote."""

    def act(folder: Path) -> None:
        torch.save(content, folder / "w.pth")
        gohsp.open_model(NAME, weights=folder / "w.pth", arguments=TINY)

    return act


def foreign(config: dict[str, Any], file: str = "model.safetensors", content: str = "") -> Act:
    """Open a folder with this config and one file more."""

    def act(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / file).write_text(content)
        gohsp.open_model(folder)

    return act


def described(change: Callable[[Any], object]) -> Act:
    """Describe a tiny model after a change, or what that returns."""

    def act(_: Path) -> None:
        model = tiny()
        changed: Any = change(model)
        gohsp.describe(model if changed is None else changed)

    return act


def pruned(make: Callable[[], Any], **options: Any) -> Act:
    return lambda folder: gohsp.run(make(), "digits", "params=-30%", folder / "run", **options)


def finetuned(make: Callable[[], Any]) -> Act:
    return pruned(make, config=gohsp.Config(method="finetune"))


def of_no_square_image(folder: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "num_classes": 2}
    model = gohsp.open_model("torchvision:vit_b_16", arguments=sizes)
    torch.save({**model.state_dict(), "encoder.pos_embedding": torch.zeros(1, 7, 16)}, folder / "w.pth")
    gohsp.open_model("torchvision:vit_b_16", arguments=sizes, weights=folder / "w.pth")


def launched_twice(folder: Path) -> None:
    with patch.dict(os.environ, WORLD_SIZE="2"):
        gohsp.run(tiny(), "digits", "params=-30%", folder / "run")


def _two_models(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        tensor = state.pop(name)
        state |= {f"student.{name}": tensor, f"teacher.{name}": tensor.clone()}


def _headless(state: dict[str, torch.Tensor]) -> None:
    del state["head.weight"], state["head.bias"]


class _Aside(nn.Module):
    """A model beside one that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside = tiny(), tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.used(images)


def _classifier_of_four(model: Any) -> None:
    model.head = nn.Linear(64, 10)


def _behind_rms_norms() -> Any:
    return tiny("vit_base_patch16_rpn_224", norm_layer="rmsnorm")


def _tied(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _adapted(model: Any) -> None:
    linear = model.blocks[0].attn.qkv
    linear.base_layer = nn.Linear(32, 96)


def _integers(model: Any) -> None:
    weight = torch.ones(128, 32, dtype=torch.int8)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(weight, requires_grad=False)


def _own_forward(model: Any) -> None:
    model.forward = model.forward_features


def _on_fc1(change: Callable[[nn.Module], object]) -> Act:
    def act(model: Any) -> None:
        change(model.blocks[0].mlp.fc1)

    return described(act)


CASES = (
    Refusal("no model name", opened(""), CheckpointError, "is neither a model folder nor a timm model"),
    Refusal("None for a model name", opened(None), CheckpointError, "is neither a model folder nor a timm model"),
    Refusal("a misspelt timm name", opened("deit_tny_patch16_224"), CheckpointError, "'deit_tiny_patch16_224'"),
    Refusal("a path to no folder", opened("../../vit_tiny_patch16_224"), CheckpointError, "there is no such folder"),
    Refusal("a file in place of a folder", lambda f: gohsp.open_model(_touched(f / "model.safetensors")),
            CheckpointError, "it is a file"),
    Refusal("a folder that gohsp did not write", lambda f: gohsp.open_model(f), CheckpointError, "config.json"),
    Refusal("timm's local-dir: names", opened("local-dir:finetuned"), CheckpointError, "give the folder's own name"),
    Refusal("a folder of another library", foreign({"model_type": "vit"}), CheckpointError, "no 'architectures'"),
    Refusal("a folder of transformers of a class that is not made here", foreign({"architectures": ["BertModel"]}),
            CheckpointError, "'BertModel'"),
    Refusal("a folder of transformers with its weights as a pickle", foreign(VIT, "pytorch_model.bin"),
            CheckpointError, "pytorch_model.bin"),
    Refusal("a folder of transformers with sizes that are texts", foreign({**VIT, "hidden_size": "16"}),
            CheckpointError, "'hidden_size'"),
    Refusal("a folder of transformers with weights split in files elsewhere",
            foreign(VIT, "model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}'),
            CheckpointError, "beside it"),
    Refusal("an image processor that is not known here",
            foreign(VIT, "preprocessor_config.json", '{"size": [16]}'), CheckpointError, "image processor"),
    Refusal("a hub's repository without asking for its weights", opened("me/vit"), CheckpointError, "are asked for"),
    Refusal("a hub's repository without a network", offline("me/vit"), CheckpointError, "that can be reached"),
    Refusal("a misspelt name of torchvision", opened("torchvision:vit_b16"), CheckpointError, "'vit_b_16'"),
    Refusal("a misspelt argument of torchvision's", opened("torchvision:vit_b_16", arguments={"img_size": 8}),
            CheckpointError, "'image_size'"),
    Refusal("stages of torchvision's Swin without a number of heads",
            opened("torchvision:swin_t", arguments={"num_heads": [3, 6]}), CheckpointError, "for each stage"),
    Refusal("torchvision's position embeddings of no square image", of_no_square_image, CheckpointError,
            "cannot be resampled"),
    Refusal("a tag of weights that timm does not have", opened(f"{NAME}.best", pretrained=True),
            CheckpointError, f"'{NAME}.augreg_in21k'"),
    Refusal("pretrained weights that timm does not have", opened("vit_giant_patch14_224", pretrained=True),
            CheckpointError, "give a weights file"),
    Refusal("pretrained weights without a network", offline(NAME), CheckpointError, "cannot be fetched"),
    Refusal("a hub's model without a network", offline("hf-hub:me/vit"), CheckpointError, "cannot be read from"),
    Refusal("a hub's model without asking for its weights", opened("hf-hub:me/vit"), CheckpointError, "pretrained"),
    Refusal("a hub's id of three parts", opened("hf-hub:a/b/c", pretrained=True), CheckpointError, "a/b/c"),
    Refusal("pretrained weights for other classes", opened(NAME, pretrained=True, arguments={"num_classes": 10}),
            CheckpointError, "its classifier would be random"),
    Refusal("an architecture that is no plain ViT", opened("resnet18"), UnsupportedModelError, "'resnet18'"),
    Refusal("another norm than LayerNorm behind sub-layers", described(lambda _: _behind_rms_norms()),
            UnsupportedModelError, "RmsNorm behind a sub-layer"),
    Refusal("a layout with a norm and LayerScale behind a sub-layer",
            lambda _: gohsp.families.Branch(module="attn", after="norm", gain="scale"),
            UnsupportedModelError, "give after= or gain="),
    Refusal("a misspelt argument of the architecture", with_arguments(imgsize=8), CheckpointError, "'img_size'"),
    Refusal("a checkpoint among the arguments", with_arguments(checkpoint_path="x.pth"), CheckpointError,
            "'checkpoint_path' is no argument"),
    Refusal("a million blocks", with_arguments(depth=1_000_000), CheckpointError, "0 to 512"),
    Refusal("no blocks", with_arguments(depth=0), UnsupportedModelError, "no block that can be"),
    Refusal("text for a number", with_arguments(embed_dim="192"), CheckpointError, "'embed_dim' is '192'"),
    Refusal("sizes of a model that fits no memory", with_arguments(embed_dim=16384, num_heads=1, num_classes=10**6),
            CheckpointError, "billion parameters"),
    Refusal("heads that do not divide the width", with_arguments(num_heads=5), CheckpointError, "num_heads"),
    Refusal("an image smaller than a patch", with_arguments(img_size=8), UnsupportedModelError, "cannot compute"),
    Refusal("weights and pretrained weights", opened(NAME, weights="w.safetensors", pretrained=True),
            CheckpointError, "not both"),
    Refusal("a name without weights, not to be trained first",
            lambda folder: gohsp.run(NAME, "digits", "params=-40%", folder / "run"), CheckpointError, "--pretrained"),
    Refusal("a weights file of an unknown kind", with_file("w.npz", b""), CheckpointError, "in one of"),
    Refusal("a pickled weights file that holds a module", with_pickle(nn.Linear(2, 2)), CheckpointError, "holds obj"),
    Refusal("a pickled weights file that calls a function", with_file("w.pth", b"cos\nsystem\n(S'true'\ntR."),
            CheckpointError, "plain values alone"),
    Refusal("a pickled weights file that is empty", with_file("w.pth", b""), CheckpointError, "is damaged"),
    Refusal("a pickled weights file without weights", with_pickle({"epoch": 3}), CheckpointError, "no table of names"),
    Refusal("a pickled weights file with several models", with_pickle({"model": BATCHED, "ema": dict(BATCHED)}),
            CheckpointError, "['model', 'ema']"),
    Refusal("a missing weights file", with_file("w.safetensors", None), CheckpointError, "is missing"),
    Refusal("an empty weights file", with_file("w.safetensors", b""), CheckpointError, "damaged, truncated or no"),
    Refusal("a weights file that is none", with_file("w.safetensors", b"\xff" * 99), CheckpointError, "damaged"),
    Refusal("weights of another size", with_weights(lambda s: None, embed_dim=64), CheckpointError, "the model has"),
    Refusal("weights without a classifier", with_weights(_headless), CheckpointError, '{"num_classes": 10}'),
    Refusal("weights with another number of classes than is asked for", with_weights(lambda s: None, num_classes=5),
            CheckpointError, "model_arguments.num_classes"),
    Refusal("weights of several models", with_weights(_two_models), CheckpointError, "['student.', 'teacher.']"),
    Refusal("grey weights for colour images", with_weights(lambda s: None, in_chans=3), CheckpointError, "[32, 1, 4,"),
    Refusal("quantised weights", with_weights(lambda s: s.update({"head.bias": torch.ones(10, dtype=torch.int8)})),
            CheckpointError, "'head.bias' is torch.int8"),
    Refusal("weights with NaN", with_weights(lambda s: s["head.bias"].fill_(float("nan"))), NonFiniteError, "NaN"),
    Refusal("a model on the meta device", lambda f: gohsp.save(tiny().to("meta"), f), NonFiniteError, "meta device"),
    Refusal("a part of a model that DataParallel wraps", described(lambda m: nn.Sequential(nn.DataParallel(m))),
            UnsupportedModelError, "model.0 = model.0.module"),
    Refusal("a part that the model does not have", lambda _: gohsp.describe(tiny(), at="block"), PlanError, "'blocks'"),
    Refusal("a part without blocks", lambda _: gohsp.describe(tiny(), at="head"), UnsupportedModelError,
            "module 'head'"),
    Refusal("a part that no image passes through", lambda _: gohsp.describe(_Aside(), at="aside"),
            UnsupportedModelError, "no image passes through"),
    Refusal("a weight norm", _on_fc1(parametrizations.weight_norm), UnsupportedModelError, "remove_parametrizations"),
    Refusal("a weight norm of the old kind", _on_fc1(torch.nn.utils.weight_norm), UnsupportedModelError,
            "remove_weight_norm"),
    Refusal("a spectral norm of the old kind", _on_fc1(torch.nn.utils.spectral_norm), UnsupportedModelError,
            "remove_spectral_norm"),
    Refusal("masks of torch.nn.utils.prune", _on_fc1(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
            UnsupportedModelError, "prune.remove(module, 'weight')"),
    Refusal("LoRA layers that are not merged", described(_adapted), UnsupportedModelError, "merge_and_unload"),
    Refusal("quantised linear layers", described(_integers), UnsupportedModelError, "quantise"),
    Refusal("weights that two blocks share", described(_tied), UnsupportedModelError, "is the same parameter as"),
    Refusal("a forward set on the instance", described(_own_forward), UnsupportedModelError, "del module.forward"),
    Refusal("a classifier that does not fit the features", pruned(lambda: _changed(_classifier_of_four)),
            UnsupportedModelError, "cannot compute an image"),
    Refusal("a model with one logit, to be fine-tuned", finetuned(lambda: tiny(num_classes=1)),
            UnsupportedModelError, "single logit"),
    Refusal("a backbone without a classifier, to be fine-tuned", finetuned(lambda: tiny(num_classes=0)),
            UnsupportedModelError, "reset_classifier"),
    Refusal("one output a token, to be fine-tuned", finetuned(lambda: tiny(global_pool="")),
            UnsupportedModelError, "[1, 5, 10]"),
    Refusal("weights for a model that is given as a module", pruned(tiny, weights="w.safetensors"), CheckpointError,
            "brings its own weights"),
    Refusal("several processes", launched_twice, RunError, "WORLD_SIZE=2"),
)  # fmt: skip


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _changed(change: Callable[[Any], object]) -> Any:
    model = tiny()
    change(model)
    return model
