"""How a model gets in: names, arguments and weights files; wrapped and disguised modules; what a run needs of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gohsp
from gohsp import cli
from gohsp.config import from_mapping
from gohsp.core.moments import collect_moments
from gohsp.errors import CheckpointError, GohspError, RunError, UnsupportedModelError
from gohsp.structure import keep_everything

pytestmark = pytest.mark.usefixtures("no_pictures")

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
CALIBRATION = {"device": "cpu", "calibration": {"images": 32, "holdout": 8}}
ONESHOT = from_mapping(CALIBRATION)


def tiny(name: str = NAME, *, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at a value that an initialiser would give it too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def opened(weights: Path | None = None, **arguments: Any) -> Any:
    torch.manual_seed(1)
    return gohsp.open_model(NAME, weights=weights, arguments={**SMALL, **arguments})


def run(model: Any, out: Path, **options: Any) -> gohsp.RunResult:
    return gohsp.run(model, "digits", "params=-20%", out, **{"config": ONESHOT, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gohsp.save(tiny(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(tiny().state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


# Names


def test_open_model_takes_names_and_folders(folder: Path, weights: Path):
    model = opened(weights)
    assert not model.training
    assert torch.equal(model.head.weight, load_file(weights)["head.weight"])
    assert torch.equal(gohsp.open_model(folder).get_parameter("head.weight"), model.head.weight)
    assert torch.equal(gohsp.open_model(str(folder)).get_parameter("head.weight"), model.head.weight)


def test_a_name_without_weights_is_made_as_timm_makes_it():
    torch.manual_seed(1)
    expected = timm.create_model(NAME, **SMALL).state_dict()
    state = opened().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("given", [{"weights": "w.safetensors"}, {"pretrained": True}, {"arguments": {"img_size": 8}}])
def test_a_folder_takes_no_other_weights(folder: Path, given: dict[str, Any]):
    with pytest.raises(CheckpointError, match="is a model folder and brings its own weights and arguments"):
        gohsp.open_model(folder, **given)


NAMES = [
    "",
    "x\0y",
    "a" * 5000,
    "a/b",
    "../../" + NAME,
    "timm/" + NAME,
    "local-dir:.",
    "hf-hub:",
    "HF_HUB:a/b",
    "\\\\a\\b",
]


@pytest.mark.parametrize(
    "name", [*NAMES, ".", "..", "C:\\model", NAME + ".", NAME + ".nonsense", None, 3, b"vit", [NAME]]
)
def test_no_name_ends_in_an_error_of_another_library(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        gohsp.open_model(name)
    with pytest.raises(CheckpointError):
        run(name, tmp_path / "run")


@pytest.mark.parametrize("name", ["resnet18", "hiera_tiny_224", "mvitv2_tiny", "cait_xxs24_224"])
def test_another_architecture_is_refused_by_name_and_before_its_weights(name: str, tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match=rf"'{name}': .* be pruned"):
        gohsp.open_model(name, weights=tmp_path / "missing.safetensors")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a model into the hub's cache, which is all that there is of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(identifier: str, config: Any, model: nn.Module) -> None:
        repository = tmp_path / "hub" / f"models--{identifier.replace('/', '--')}"
        snapshot = repository / "snapshots" / "c0ffee"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c0ffee")
        (snapshot / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), snapshot / "model.safetensors")

    return put


def test_a_timm_model_of_the_hub_is_opened(hub: Callable[..., None]):
    model = tiny(in_chans=3)
    config = {"architecture": NAME, "num_classes": 10, "model_args": {**SMALL, "in_chans": 3}, "pretrained_cfg": {}}
    hub("me/vit", config, model)
    opened = gohsp.open_model("hf-hub:me/vit", pretrained=True)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(opened(images), model(images))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": NAME, "model_args": {"depth": 1_000_000}, "pretrained_cfg": {}}, "'depth' is 1000000"),
        ({"architecture": NAME, "model_args": {"checkpoint_path": "x.pth"}, "pretrained_cfg": {}}, "'checkpoint_path'"),
        ({"architecture": NAME, "model_args": [1], "pretrained_cfg": {}}, "hf-hub:me/vit"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "ResNet has no block that can be pruned"),
        ({"architecture": "nonsense", "pretrained_cfg": {}}, "nonsense"),
        ({"architecture": 3}, "hf-hub:me/vit"),
        ({}, "hf-hub:me/vit"),
        ([], "hf-hub:me/vit"),
    ],
)
def test_a_hub_model_that_asks_for_other_things_is_refused(hub: Callable[..., None], config: Any, message: str):
    hub("me/vit", config, tiny())
    with pytest.raises(GohspError, match=message):
        gohsp.open_model("hf-hub:me/vit", pretrained=True)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.augreg_in21k", "hf-hub:me/vit", "HF_HUB:me/vit"])
def test_weights_that_cannot_be_fetched_are_an_error_of_ours(hub: Callable[..., None], name: str):
    with pytest.raises(CheckpointError, match=r"cannot be (fetched|read from the hub)"):
        gohsp.open_model(name, pretrained=True)


# Weights files


def test_weights_are_loaded_as_they_are(weights: Path):
    state = opened(weights).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(weights).items())


def test_position_embedding_is_resampled(weights: Path):
    model = opened(weights, img_size=16)
    given = load_file(weights)
    expected = resample_abs_pos_embed(given["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, given["blocks.0.mlp.fc1.weight"])


def test_another_classifier_must_be_asked_for(weights: Path):
    with pytest.raises(CheckpointError, match=r"'head\.weight' is \[10, 32\], the model has \[4, 32\]"):
        opened(weights, num_classes=4)

    def with_new(**arguments: Any) -> Any:
        torch.manual_seed(1)
        return gohsp.open_model(NAME, weights=weights, arguments={**SMALL, **arguments}, new_classifier=True)

    given = load_file(weights)
    model = with_new(num_classes=4)
    assert torch.equal(model.head.weight, opened(num_classes=4).head.weight)
    assert torch.equal(model.norm.weight, given["norm.weight"])
    assert torch.equal(with_new().head.weight, given["head.weight"])
    with pytest.raises(
        CheckpointError, match=r"'blocks\.0\.mlp\.fc1\.weight' is \[128, 32\], the model has \[64, 32\]"
    ):
        with_new(num_classes=4, mlp_ratio=2.0)  # a new classifier excuses nothing else


def test_the_number_of_classes_is_that_of_the_files_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "gohsp")
    path, sizes = tmp_path / "w.pth", {key: value for key, value in SMALL.items() if key != "num_classes"}
    state = tiny(num_classes=7).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    model = gohsp.open_model(NAME, weights=path, arguments=sizes)
    assert torch.equal(model.get_parameter("head.weight"), state["head.weight"])
    assert "their classifier 'head' tells 7 classes apart" in caplog.text

    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}
    torch.save(gohsp.open_model("torchvision:vit_b_16", arguments={**sizes, "num_classes": 3}).state_dict(), path)
    model = gohsp.open_model("torchvision:vit_b_16", weights=path, arguments=sizes)
    assert gohsp.models.num_classes(model) == 3


PREFIXES = ["module.", "_orig_mod.", "backbone.", "model.", "encoder.", "_orig_mod.module.backbone."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_left_out_and_said(tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture):
    state = tiny().state_dict()
    save_file({prefix + name: tensor.clone() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    loaded = opened(tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert f"the prefix '{prefix}'" in caplog.text


def test_a_classifier_may_stand_outside_the_prefix_but_nothing_may_be_left_over(tmp_path: Path):
    state = tiny().state_dict()
    path = tmp_path / "w.safetensors"
    mixed = {name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in state.items()}
    save_file(mixed, path)
    assert torch.equal(opened(path).head.weight, state["head.weight"])
    save_file({**mixed, "criterion.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"'criterion\.weight' is not part of the model"):
        opened(path)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colour_weights_are_adapted_to_other_channels_and_that_is_said(
    tmp_path: Path, channels: int, caplog: pytest.LogCaptureFixture
):
    state = tiny(in_chans=3).state_dict()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    model = opened(tmp_path / "w.safetensors", in_chans=channels)
    expected = adapt_input_conv(channels, state["patch_embed.proj.weight"])
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert f"adapted to {channels}" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {"stranger": torch.zeros(2)},
        {"patch_embed.proj.weight": torch.zeros(5)},
        {"pos_embed": torch.zeros(3)},
        {"mask_token": torch.zeros(3)},
        {"module.visual.class_embedding": torch.zeros(3)},
        {"model.patch_embed.proj.weight": torch.zeros(())},
        {"a.patch_embed.proj.weight": torch.zeros(2), "patch_embed.proj.weight": torch.zeros(2)},
        {},
    ],
    ids=lambda state: next(iter(state), "none"),
)
def test_foreign_weights_are_refused(tmp_path: Path, state: dict[str, Tensor]):
    save_file(state, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors"):
        opened(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000])
def test_truncated_weights_are_refused(weights: Path, size: int):
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors' cannot be read .*damaged, truncated"):
        opened(weights)


@pytest.mark.parametrize("suffix", ["", ".npz", ".h5", ".zip"])
def test_weights_of_another_kind_are_refused_with_the_kinds_that_are_read(tmp_path: Path, suffix: str):
    (tmp_path / f"weights{suffix}").touch()
    with pytest.raises(CheckpointError, match=r"files that are read end in \.safetensors or in one of .*'\.pth'"):
        opened(tmp_path / f"weights{suffix}")


def test_a_folder_in_place_of_a_weights_file_is_refused(tmp_path: Path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        opened(tmp_path / "w.safetensors")


# Modules


class Wrapper(nn.Module):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"vit": vit})

    def forward(self, images: Tensor) -> Tensor:
        return self.net["vit"](images)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "compiled": (torch.compile, "_orig_mod"),
    "parallel": (nn.DataParallel, "module"),
    "distributed": (nn.parallel.DistributedDataParallel, "module"),
    "twice": (lambda model: torch.compile(nn.DataParallel(model)), "_orig_mod"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_is_taken_out_of_its_wrapper(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wrap, attribute = WRAPPERS[name]
    model, images = tiny(), torch.randn(64, 1, 8, 8)
    wrapped = wrap(model)
    network = gohsp.describe(model)
    assert gohsp.describe(wrapped) == network
    assert f"the model inside it, model.{attribute}, is taken" in caplog.text
    gohsp.save(wrapped, tmp_path / "model")
    assert type(gohsp.load(tmp_path / "model")) is type(model)
    widths = network.widths | {"blocks.0.mlp": gohsp.FfnWidths(units=8)}
    result = gohsp.prune(wrapped, images, "params=-1%", widths=widths, config=ONESHOT)
    assert type(result.model) is type(model)
    assert type(gohsp.compact(wrapped, keep_everything(network), images).model) is type(model)
    gohsp.save(result.model, tmp_path / "small", own=True)
    assert type(gohsp.apply(wrapped, tmp_path / "small")) is type(model)
    if name != "compiled":  # which has the names of what it wraps, and computes the same
        with pytest.raises(UnsupportedModelError, match="the very model that was described"):
            collect_moments(wrapped, network, [images])


def test_a_run_takes_a_wrapped_model(tmp_path: Path):
    result = run(nn.DataParallel(tiny()), tmp_path / "run")
    assert type(result.model) is type(tiny())


@pytest.mark.parametrize("wrap", [Wrapper, torch.optim.swa_utils.AveragedModel], ids=["own", "average"])
def test_a_module_that_holds_a_vit_is_taken(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path):
    wrapped, images = wrap(tiny()).eval(), torch.randn(64, 1, 8, 8)
    result = gohsp.prune(wrapped, images, "params=-20%", config=ONESHOT)
    gohsp.save(result.model, tmp_path)
    loaded = gohsp.apply(wrapped, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))


def lora(linear: nn.Linear) -> nn.Module:
    """What peft puts in a linear map's place."""
    adapter = nn.Module()
    adapter.base_layer = linear
    adapter.lora_A, adapter.lora_B = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)
    return adapter


def _replace(name: str, make: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))

    return change


class Int8Linear(nn.Module):
    """Of the kind that quantisation libraries put in a linear map's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("weight", (127 * linear.weight.detach()).to(torch.int8))


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def _share_a_block(model: Any) -> None:
    model.blocks[1] = model.blocks[0]


def _accelerated(model: Any) -> None:
    model.forward = lambda x: model.forward_head(model.forward_features(x)).float()


DISGUISES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.blocks[1].mlp.fc1),
        r"'blocks\.1\.mlp\.fc1' .*remove_param",
    ),
    "orthogonal head": (lambda m: parametrizations.orthogonal(m.head), r"'head' is parametrised"),
    "masks": (lambda m: prune.l1_unstructured(m.blocks[1].mlp.fc2, "bias", 0.5), r"prune\.remove\(module, 'bias'\)"),
    "lora": (_replace("blocks.0.attn.qkv", lora), r"'blocks\.0\.attn\.qkv' is an adapter .*merge_and_unload"),
    "lora on the head": (_replace("head", lora), r"'head' is an adapter"),
    "quantised": (_replace("blocks.1.mlp.fc1", Int8Linear), r"'blocks\.1\.mlp\.fc1' is a .*Int8Linear.*quantise"),
    "subclass": (_replace("blocks.1.attn.proj", lambda _: Halved(32, 32)), r"'blocks\.1\.attn\.proj' is a .*Halved"),
    "shared block": (_share_a_block, r"'blocks\.1\..*' is the same parameter as 'blocks\.0\."),
    "forward": (_accelerated, r"the model has a forward that was set on the instance.*unwrap_model"),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguised_module_is_refused_before_any_work(name: str, tmp_path: Path):
    change, message = DISGUISES[name]
    model = tiny()
    change(model)
    for act in (lambda: gohsp.describe(model), lambda: run(model, tmp_path / "run")):
        with pytest.raises(UnsupportedModelError, match=message):
            act()
    assert not (tmp_path / "run").exists()


def test_made_plain_as_the_message_says_it_is_pruned(tmp_path: Path):
    model = tiny()
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", 0.5)
    torch.nn.utils.parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")
    prune.remove(model.blocks[1].mlp.fc1, "weight")
    assert run(model, tmp_path / "run").report.pruned.params < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_a_model_from_accelerate_is_taken_once_it_is_unwrapped_altogether(kept: bool):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(tiny()), keep_fp32_wrapper=kept)
    AcceleratorState._reset_state(reset_partial_state=True)
    if kept:
        with pytest.raises(UnsupportedModelError, match="keep_fp32_wrapper=False"):
            gohsp.describe(model)
    else:
        assert gohsp.describe(model) == gohsp.describe(tiny())


# What a run needs of a model


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "one logit": (lambda: tiny(num_classes=1), r"\[1, 1\].*single logit"),
    "features": (lambda: tiny(num_classes=0), r"\[1, 32\].*reset_classifier"),
    "dinov2": (
        lambda: tiny("vit_small_patch14_dinov2", img_size=28, patch_size=14, num_classes=0),
        r"\[1, 32\].*reset_classifier",
    ),
    "tokens": (lambda: tiny(global_pool=""), r"\[1, 5, 10\].*global_pool"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("method", ["finetune", "gohsp"])
def test_a_model_without_class_predictions_is_not_trained(name: str, method: str, tmp_path: Path):
    make, message = UNFIT[name]
    with pytest.raises(UnsupportedModelError, match=message):
        run(make(), tmp_path / "run", config=from_mapping({**CALIBRATION, "method": method}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["one logit", "features", "tokens"])
def test_one_shot_and_ranking_take_any_output_and_scores_need_classes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = UNFIT[name][0]()
    assert run(model, tmp_path / "run").report.pruned.params < sum(p.numel() for p in model.parameters())
    gohsp.save(model, tmp_path / "model")
    assert cli.main(["evaluate", str(tmp_path / "model"), "--data", "digits"]) == 1
    assert "the model's output for an image is" in capsys.readouterr().err


def test_a_single_logit_becomes_two_classes_as_the_message_says():
    model, images = tiny(num_classes=1), torch.randn(3, 1, 8, 8)
    two = copy.deepcopy(model)
    two.head = nn.Linear(32, 2)
    with torch.no_grad():
        for new, old in ((two.head.weight, model.head.weight), (two.head.bias, model.head.bias)):
            new.copy_(torch.cat([torch.zeros_like(old), old]))
        torch.testing.assert_close(two(images).softmax(dim=1)[:, 1:], model(images).sigmoid())


def test_a_distilled_model_in_distilled_training_is_fine_tuned_on_its_mean(tmp_path: Path):
    model = tiny("deit_tiny_distilled_patch16_224")
    model.set_distilled_training(True)
    model.train()
    config = from_mapping(
        {
            **CALIBRATION,
            "method": "finetune",
            "precision": "bf16",
            "finetune": {"epochs": 1},
            "compare_dense": False,
        }
    )
    result = run(model, tmp_path / "run", config=config)
    assert model.training
    assert model.distilled_training
    assert result.report.pruned.params < result.report.dense.params
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(gohsp.load(tmp_path / "run")(images), result.model(images))


@pytest.mark.parametrize("given", [{"weights": "w.safetensors"}, {"pretrained": True}])
def test_a_module_takes_no_other_weights(given: dict[str, Any], tmp_path: Path):
    with pytest.raises(CheckpointError, match="a model that is given as a module brings its own"):
        run(tiny(), tmp_path / "run", **given)


# Several processes


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_launch_in_several_processes_is_refused_at_once(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RunError, match=rf"{variable}=2: several processes \(torchrun"):
        run("no/such/model", tmp_path / "run")
    assert cli.main(["prune", "no/such/model", "--data", "digits", "--budget", "params=-9%", "--out", "run"]) == 1
    assert f"{variable}=2" in capsys.readouterr().err


def test_a_launch_in_one_process_is_none_of_several(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["evaluate", str(folder), "--data", "digits"]) == 0
