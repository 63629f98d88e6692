"""Model folders and weights files: what goes in comes out, and what does not fit is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import gohsp
from gohsp import models
from gohsp.data import Preprocessing
from gohsp.errors import CheckpointError, NonFiniteError, StorageError, UnsupportedModelError
from gohsp.structure import AttentionKept, FfnKept, Kept, kept_to_json
from robustness import child

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
EQUAL = ((0, 2), 4, 4, 24), ((0, 1, 3), 6, 6, 40)
UNEQUAL = ((1, 3), 4, 6, 24), ((2,), 8, 2, 128)
GONE = ((), 0, 0, 24), ((2, 3), 4, 4, 0)
VARIANTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "dense": ("vit_tiny_patch16_224", {}, None),
    "arguments": ("vit_tiny_patch16_224", {"img_size": (8, 12), "in_chans": 3, "num_classes": 7}, None),
    "equal": ("vit_tiny_patch16_224", {}, EQUAL),
    "unequal": ("vit_tiny_patch16_224", {"in_chans": 3, "num_classes": 3}, UNEQUAL),
    "sublayers gone": ("vit_tiny_patch16_224", {}, GONE),
    "sublayers gone and layerscale": ("vit_tiny_patch16_224", {"init_values": 0.1}, GONE),
    "layerscale": ("vit_tiny_patch16_224", {"init_values": 0.1}, UNEQUAL),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}, UNEQUAL),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, UNEQUAL),
}


def tiny(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at a value that an initialiser would give it too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def kept_of(blocks: Any) -> Kept:
    kept: dict[str, AttentionKept | FfnKept] = {}
    for i, (heads, qk, vo, units) in enumerate(blocks):
        kept[f"blocks.{i}.attn"] = AttentionKept(
            heads=heads,
            qk=tuple(tuple(range(8 - qk, 8)) for _ in heads),
            vo=tuple(tuple(range(vo)) for _ in heads),
        )
        kept[f"blocks.{i}.mlp"] = FfnKept(units=tuple(range(units)))
    return kept


def images_for(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = model.patch_embed.img_size  # type: ignore[union-attr]
    return torch.randn(3, model.in_chans, height, width, generator=generator)  # type: ignore[call-overload]


def make(variant: str) -> tuple[nn.Module, Kept | None]:
    name, arguments, blocks = VARIANTS[variant]
    model = tiny(name, **arguments)
    if blocks is None:
        return model, None
    kept = kept_of(blocks)
    return gohsp.compact(model, kept, images_for(model)).model, kept


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pruned model's folder, to be damaged."""
    model, kept = make("unequal")
    gohsp.save(model, tmp_path / "model", kept=kept)
    return tmp_path / "model"


# Round trip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[nn.Module, Kept | None]]]:
    root = tmp_path_factory.mktemp("models")
    made = {variant: make(variant) for variant in VARIANTS}
    for variant, (model, kept) in made.items():
        gohsp.save(model, root / variant, kept=kept, made_by={"by": "test"}, metrics={"top1": 12.5})
    return root, made


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(saved, variant: str):
    root, made = saved
    model, kept = made[variant]
    loaded = gohsp.load(root / variant)
    state, again = model.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[k], again[k]) and state[k].dtype == again[k].dtype for k in state)
    assert not loaded.training
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(model(images_for(model)), loaded(images_for(model)))
    assert [type(a.attn) for a in loaded.blocks] == [type(a.attn) for a in model.blocks]  # type: ignore[union-attr]
    assert gohsp.describe(loaded) == gohsp.describe(model)
    config = json.loads((root / variant / "config.json").read_text())
    assert config["kept"] == (kept_to_json(kept) if kept else None)
    assert (config["made_by"], config["metrics"]) == ({"by": "test"}, {"top1": 12.5})
    assert config["format_version"] == 2
    assert config["params"] == sum(p.numel() for p in model.parameters())
    assert sorted(os.listdir(root / variant)) == ["config.json", "model.safetensors"]


def test_attention_stays_timms_where_widths_allow(saved):
    root, _ = saved

    def classes(variant: str) -> list[str]:
        return [type(b.attn).__module__ for b in gohsp.load(root / variant).blocks]  # type: ignore[union-attr]

    assert classes("equal") == classes("dense") == ["timm.layers.attention"] * 2
    assert classes("unequal") == ["gohsp.models.attention"] * 2


def test_a_loaded_model_can_be_saved_again(saved, tmp_path: Path):
    root, _ = saved
    gohsp.save(gohsp.load(root / "unequal"), tmp_path)
    before, after = (json.loads((f / "config.json").read_text()) for f in (root / "unequal", tmp_path))
    same = ("library", "architecture", "arguments", "widths", "preprocessing", "params", "macs")
    assert {k: before[k] for k in same} == {k: after[k] for k in same}
    assert (root / "unequal" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_new_process_loads_the_same_functions(saved, tmp_path: Path):
    root, made = saved
    inputs = {variant: images_for(model) for variant, (model, _) in made.items()}
    save_file(inputs, tmp_path / "images.safetensors")
    script = f"""
import torch, gohsp
from safetensors.torch import load_file, save_file
torch.load = None  # weights come without unpickling
images = load_file({str(tmp_path / "images.safetensors")!r})
with torch.no_grad():
    logits = {{v: gohsp.load({str(root)!r} + "/" + v)(x) for v, x in images.items()}}
save_file(logits, {str(tmp_path / "logits.safetensors")!r})
"""
    process = child.start(exec, script, {})
    process.join(300)
    assert process.exitcode == 0
    logits = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        for variant, (model, _) in made.items():
            # Another process may use another number of threads, and so another order of sums.
            torch.testing.assert_close(logits[variant], model(inputs[variant]), rtol=1e-5, atol=1e-6)


def test_preprocessing_is_kept(tmp_path: Path):
    model = tiny(in_chans=3)
    changed = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.7, "interpolation": "bilinear"}
    model.pretrained_cfg = {**model.pretrained_cfg, **changed, "crop_mode": "squash"}  # type: ignore[dict-item]
    gohsp.save(model, tmp_path)
    expected = Preprocessing(image_size=8, channels=3, **changed, crop_mode="squash")  # type: ignore[arg-type]
    assert Preprocessing.from_model(gohsp.load(tmp_path)) == expected


# Refused on loading

ATTENTION = {"heads": 1, "qk": 8, "vo": 8}


def widths(last: dict[str, Any]) -> dict[str, Any]:
    """Widths of two blocks; ``last`` are those of the second one's attention."""
    mlp = {"units": 8}
    return {"blocks.0.attn": ATTENTION, "blocks.0.mlp": mlp, "blocks.1.attn": last, "blocks.1.mlp": mlp}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, r"format version 3, this gohsp reads up to 2; update gohsp"),
        ({"format_version": None}, "no format_version"),
        ({"format_version": 0}, "'format_version' is 0"),
        ({"format_version": True}, "no format_version"),
        ({"library": "keras"}, r"library 'keras' is unknown; this version reads .*'timm'"),
        ({"architecture": "vit_nonsense"}, "'vit_nonsense' is none of timm"),
        ({"arguments": {"embed_dims": 3}}, "embed_dims"),
        ({"widths": None, "arguments": None}, "'arguments' is missing"),
        ({"widths": None}, "'widths' is missing"),
        ({"widths": {}}, "has widths of 0"),
        ({"widths": {"blocks.0.attn": ATTENTION, "blocks.0.mlp": {"units": 8}}}, "has widths of 1"),
        ({"widths": widths({"head": 1})}, r"'widths\.blocks\.1\.attn\.head"),
        ({"widths": widths({"heads": 1, "qk": 8})}, r"widths: 'blocks\.1\.attn' of the plan lacks \['vo'\]"),
        ({"widths": widths({**ATTENTION, "qk": 0})}, "give no width of 0, or all of them"),
        ({"widths": widths({**ATTENTION, "qk": -8})}, r"'widths\.blocks\.1\.attn\.qk' is -8"),
        ({"widths": widths({**ATTENTION, "qk": 2**40})}, r"'widths\.blocks\.1\.attn\.qk' is 1099511627776"),
        ({"widths": widths({**ATTENTION, "qk": 8.0})}, r"'widths\.blocks\.1\.attn\.qk' is 8\.0"),
        ({"widths": widths({**ATTENTION, "units": 8})}, "unknown key 'units'"),
        ({"widths": widths({"units": 8})}, r"blocks\.1\.attn"),
        ({"widths": {**widths(ATTENTION), "blocks.1.mlps": {"units": 8}}}, r"blocks\.1\.mlps"),
        ({"widths": [{"heads": 1, "qk": 8, "vo": 8, "ffn": 8}] * 2}, "'widths' is"),
        ({"widths": [1, 2]}, "widths"),
        ({"widths": 7}, "widths"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], message: str):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        gohsp.load(folder)


def test_a_missing_config_is_refused(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        gohsp.load(folder)


@pytest.mark.parametrize("text", ['{"format_version": 1', "", "[1]", '"x"', "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json' (cannot be read|has no format_version)"):
        gohsp.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read .*damaged, truncated"):
        gohsp.load(folder)


def test_missing_weights_are_refused_and_a_pickle_beside_is_not_read(folder: Path):
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is missing"):
        gohsp.load(folder)


def test_a_pickle_under_the_weights_name_is_refused(folder: Path):
    torch.save(make("unequal")[0].state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no safetensors"):
        gohsp.load(folder)


def test_first_mismatches_of_config_and_tensors_are_listed(folder: Path):
    changed = {
        "blocks.0.attn": {"heads": 2, "qk": 4, "vo": 8},
        "blocks.0.mlp": {"units": 24},
        "blocks.1.attn": {"heads": 1, "qk": 8, "vo": 2},
        "blocks.1.mlp": {"units": 8},
    }
    edit(folder, widths=changed)
    with pytest.raises(CheckpointError) as error:
        gohsp.load(folder)
    text = str(error.value)
    assert "'blocks.0.attn.qkv.weight' is [28, 32], the model has [32, 32]" in text
    assert text.count(" is [") == 5
    assert text.endswith("and 1 more")


def test_missing_and_additional_tensors_are_listed(folder: Path):
    state = make("unequal")[0].state_dict()
    state["stranger"] = state.pop("norm.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'norm\.bias' is missing; 'stranger' is not part of the model"):
        gohsp.load(folder)


# Saving


def test_a_failing_write_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def half(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(StorageError, match="disk full"):
        gohsp.save(tiny(), folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert gohsp.load(folder).num_classes == 3


def test_a_failing_first_write_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace = os.replace

    def weights_only(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", weights_only)
    with pytest.raises(StorageError, match="disk full"):
        gohsp.save(tiny(), tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        gohsp.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float):
    model = tiny()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"'blocks\.1\.mlp\.fc1\.weight' holds 1 NaN or infinite"):
        gohsp.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_no_vit_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="Linear has no block that can be pruned; supported: timm"):
        gohsp.save(nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_library_model_that_could_not_be_made_again_is_refused_or_ones_own(tmp_path: Path):
    model = tiny()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"own=True"):
        gohsp.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    gohsp.save(model, tmp_path / "model", own=True)
    with pytest.raises(CheckpointError, match=r"gohsp\.load\(folder, into=module\)"):
        gohsp.load(tmp_path / "model")
    into = tiny()
    into.extra = nn.Linear(2, 2)
    state = gohsp.load(tmp_path / "model", into=into).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# Modules of one's own


class Counting(nn.Module):
    """A ViT made by its class, and a norm that counts batches."""

    def __init__(self, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=32, depth=depth, num_heads=4, num_classes=classes
        )
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.vit(images))


def counting(seed: int = 0, **arguments: int) -> Counting:
    torch.manual_seed(seed)
    model = Counting(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.norm.num_batches_tracked.fill_(seed + 7)  # type: ignore[operator]
    return model.eval()


@pytest.fixture
def own(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A pruned module of one's own, and its folder."""
    model, images = counting(), torch.randn(2, 1, 8, 8)
    kept = {f"vit.{name}": of for name, of in kept_of(UNEQUAL).items()}
    small = gohsp.compact(model, kept, images).model
    gohsp.save(small, tmp_path / "own", kept=kept)
    return small, tmp_path / "own"


def test_a_module_of_ones_own_round_trips(own: tuple[nn.Module, Path]):
    small, folder = own
    config = json.loads((folder / "config.json").read_text())
    assert (config["library"], config["architecture"], config["arguments"]) == (None, None, {})
    dense = counting(seed=1)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    applied = gohsp.apply(dense, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    into = counting(seed=2).train()
    loaded = gohsp.load(folder, into=into)
    assert loaded is into
    images = torch.randn(3, 1, 8, 8)
    for model in (applied, loaded):
        state = model.state_dict()
        assert list(state) == list(small.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(images), small(images))
    again = gohsp.load(folder, into=gohsp.load(folder, into=counting()))  # a module that is cut already
    assert gohsp.describe(again) == gohsp.describe(small)


def test_a_folder_of_ones_own_takes_a_module(own: tuple[nn.Module, Path], folder: Path):
    with pytest.raises(CheckpointError, match=r"module of somebody's own.* gohsp\.load\(folder, into=module\)"):
        gohsp.load(own[1])
    for module, message in (
        (counting(depth=1), r"vit\.blocks\.1\.attn"),
        (tiny(), r"vit\.blocks\.0\.attn"),
    ):
        before = list(module.state_dict())
        with pytest.raises(CheckpointError, match=message):
            gohsp.load(own[1], into=module)
        assert list(module.state_dict()) == before
    with pytest.raises(UnsupportedModelError, match="no block that can be pruned"):
        gohsp.load(own[1], into=nn.Linear(2, 2))
    library = tiny(in_chans=3, num_classes=3)  # a library's model may be put into a module, too
    loaded = gohsp.load(folder, into=library)
    assert loaded is library
    state = gohsp.load(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("wrong", ["shape", "value", "weights"])
def test_a_module_that_gets_no_weights_is_left_as_it_was(own: tuple[nn.Module, Path], wrong: str):
    _, folder = own
    module: nn.Module = counting(seed=1, classes=7 if wrong == "shape" else 10).train()
    path = folder / "model.safetensors"
    if wrong == "value":
        tensors = load_file(path)
        tensors["vit.norm.bias"][3] = float("nan")
        save_file(tensors, path)
    if wrong == "weights":
        path.write_bytes(path.read_bytes()[:-1])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(
        (CheckpointError, NonFiniteError), match=r"is \[10, 32\], the model has|vit\.norm\.bias|damaged"
    ):
        gohsp.load(folder, into=module)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert module.training


# The hub


def test_a_hub_id_is_downloaded_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = {"allow_patterns": ["config.json", "model.safetensors", "preprocessor_config.json"]}
    assert gohsp.load("someone/small-vit").num_classes == 3
    assert asked.pop() == ("someone/small-vit", {**files, "revision": None, "token": None})
    chosen = {"revision": "v1", "token": "hf_secret"}
    gohsp.apply(gohsp.load(folder), "someone/small-vit", **chosen)
    assert asked.pop() == ("someone/small-vit", {**files, **chosen})


def test_what_is_neither_folder_nor_hub_is_refused(monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    with pytest.raises(
        CheckpointError, match="there is no folder 'no/such/folder', and names on the hub have the form OWNER/NAME"
    ):
        gohsp.load("no/such/folder")  # no repository's name has two slashes: refused without a request
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"neither a local folder nor a hub repository.*no network"):
        gohsp.load("someone/small-vit")


# What a model is, is read off the model


class ByHand(nn.Module):
    """QuickGELU as people write it themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def _set_activations(model: Any) -> None:
    for block in model.blocks:
        block.mlp.act = ByHand()


def _assign_head(model: Any) -> None:
    model.head = nn.Linear(32, 3)


CHANGES: dict[str, Any] = {
    "activations by hand": _set_activations,
    "head assigned": _assign_head,
    "reset_classifier": lambda m: m.reset_classifier(3),
    "reset_classifier with pooling": lambda m: m.reset_classifier(3, "avg"),
    "no classifier": lambda m: m.reset_classifier(0),
    "set_input_size": lambda m: m.set_input_size(16),
    "blocks dropped": lambda m: m.prune_intermediate_layers([0]),
    "half precision": lambda m: m.half(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", ["dense", "equal", "unequal"])
def test_what_was_changed_after_making_is_saved(variant: str, change: str, tmp_path: Path):
    model, _ = make(variant)
    gohsp.save(model, tmp_path / "first")
    changed: Any = gohsp.load(tmp_path / "first")
    CHANGES[change](changed)
    gohsp.save(changed, tmp_path / "second")
    again = gohsp.load(tmp_path / "second")
    images = images_for(changed).to(next(changed.parameters()).dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(images), changed.eval()(images), rtol=1e-5, atol=1e-5)
    network = gohsp.describe(again)
    assert network == gohsp.describe(changed)
    assert gohsp.count_params(network) == sum(p.numel() for p in changed.parameters())
    assert Preprocessing.from_model(again).image_size == changed.patch_embed.img_size[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"act_layer": "relu"},
        {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
        {"norm_layer": "rmsnorm"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "map"},
        {"pos_embed": "none"},
        {"final_norm": False},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_arguments_of_the_architecture_are_saved(arguments: dict[str, Any], tmp_path: Path):
    model = tiny(**arguments)
    small = gohsp.compact(model, kept_of(UNEQUAL), images_for(model)).model
    for number, saved in enumerate((model, small)):
        gohsp.save(saved, tmp_path / str(number))
        with torch.no_grad():
            expected, found = saved(images_for(model)), gohsp.load(tmp_path / str(number))(images_for(model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_saving_leaves_the_mode_of_every_module(tmp_path: Path):
    model = tiny().train()
    model.norm.eval()  # type: ignore[union-attr]
    before = [module.training for module in model.modules()]
    gohsp.save(model, tmp_path)
    assert [module.training for module in model.modules()] == before


def test_a_refused_model_leaves_the_folder_as_it_was(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError):
        gohsp.save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# The first edition

FIRST_EDITION = Path(__file__).parent / "data" / "first_edition"
"""A pruned model of version 0.1.0, whose query/key widths are not its value widths, and what it computed."""


def test_a_folder_of_the_first_edition_is_loaded(tmp_path: Path):
    expected = load_file(FIRST_EDITION / "expected.safetensors")
    model = gohsp.load(FIRST_EDITION)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["images"]), expected["logits"], rtol=1e-5, atol=1e-6)
    widths = gohsp.describe(model).widths
    assert widths["blocks.0.attn"] == gohsp.AttentionWidths(heads=1, qk=4, vo=6)
    assert widths["blocks.1.mlp"] == gohsp.FfnWidths(units=7)
    assert models.class_names(model) == ("ant", "bee", "cat")
    gohsp.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 2
    assert config["widths"]["blocks.1.attn"] == {"heads": 2, "qk": 3, "vo": 2}
    assert (tmp_path / "model.safetensors").read_bytes() == (FIRST_EDITION / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [{"heads": 1, "qk": 4, "vo": 6, "ffn": 20}]}, "has widths of 1"),
        ({"widths": [{"heads": 1, "qk": 4, "vo": 6}] * 2}, r"'blocks\.0\.mlp' of the plan lacks \['units'\]"),
        ({"widths": [{"heads": 1, "qk": 4, "ffn": 20}] * 2}, r"'blocks\.0\.attn' of the plan lacks \['vo'\]"),
        ({"widths": [{"heads": 1, "qk": 4, "vo": 6, "ffn": 20, "x": 1}] * 2}, r"widths\.blocks\.0\.attn\.x"),
        ({"widths": [{"heads": 1, "qk": -4, "vo": 6, "ffn": 20}] * 2}, r"'widths\.blocks\.0\.attn\.qk' is -4"),
        ({"widths": [1, 2]}, "'widths' is"),
        ({"widths": None}, "'widths' is missing"),
        ({"library": None}, "'library' is missing"),
        ({"stranger": 1}, "'stranger' is unknown"),
    ],
)
def test_a_damaged_folder_of_the_first_edition_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    shutil.copytree(FIRST_EDITION, tmp_path / "model")
    edit(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message):
        gohsp.load(tmp_path / "model")


def test_a_folder_is_readable_by_others_as_the_umask_says(tmp_path: Path):
    (tmp_path / "plain").touch()
    gohsp.save(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
