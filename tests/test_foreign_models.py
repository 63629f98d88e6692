"""Models of other libraries as they lie on disks and hubs: folders, names, weights files, preprocessing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

import gohsp
from gohsp import cli, models
from gohsp.config import from_mapping
from gohsp.core.objective import tensor_in
from gohsp.data import Preprocessing, eval_transform
from gohsp.errors import CheckpointError, DataError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_pictures")

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
HF = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 10,
}
TORCHVISION = {
    "image_size": 16,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "num_classes": 10,
}
ONESHOT = from_mapping({"device": "cpu", "calibration": {"images": 32, "holdout": 8}})


def library() -> Any:
    pytest.importorskip("transformers")
    return importlib.import_module("transformers")


def alive(model: Any) -> Any:
    """No weight stays at a value that an initialiser would give it too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def of_transformers(name: str = "ViT", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(library(), f"{name}Config")(**{**HF, **settings})
    return alive(getattr(library(), f"{name}ForImageClassification")(config))


def of_timm(name: str = NAME, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return alive(timm.create_model(name, **{**SMALL, **arguments}))


def same(one: nn.Module, other: nn.Module, size: int = 16) -> bool:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = tensor_in(one(images)), tensor_in(other(images))
    return torch.allclose(a, b, atol=1e-6)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A folder of transformers, with its image processor."""
    names = [f"class {number}" for number in range(10)]
    model = of_transformers(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    model.save_pretrained(tmp_path / "vit")
    processor = library().ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def folder_of_timm(tmp_path: Path) -> Path:
    model = of_timm()
    names = [f"class {number}" for number in range(10)]
    model.pretrained_cfg |= {"mean": [0.4] * 3, "num_classes": 10, "label_names": names}
    save_for_hf(model, str(tmp_path / "timm"), model_args=SMALL, safe_serialization=True)
    return tmp_path / "timm"


def rewritten(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


# Folders of transformers


def test_a_folder_of_transformers_is_opened_pruned_saved_and_loaded(vit: Path, tmp_path: Path):
    model = gohsp.open_model(vit)
    assert same(model, library().ViTForImageClassification.from_pretrained(vit))
    images = torch.randn(32, 3, 16, 16)
    small = gohsp.prune(model, images, "params=-10%", config=ONESHOT).model
    gohsp.save(small, tmp_path / "small")
    loaded: Any = gohsp.load(tmp_path / "small")
    output = loaded(pixel_values=images[:2], output_hidden_states=True)
    assert type(output) is importlib.import_module("transformers.modeling_outputs").ImageClassifierOutput
    assert len(output.hidden_states) == 3
    assert same(loaded, small)
    assert loaded.config.id2label[3] == "class 3"
    assert models.class_names(loaded) == tuple(f"class {i}" for i in range(10))
    assert Preprocessing.from_model(loaded) == Preprocessing.from_model(model)
    processor = library().AutoImageProcessor.from_pretrained(tmp_path / "small")
    assert list(processor.image_mean) == [0.4] * 3
    again = gohsp.open_model(tmp_path / "small")  # and once more, since it may be cut again
    gohsp.save(again, tmp_path / "again")
    assert (tmp_path / "again/preprocessor_config.json").exists()
    gohsp.save(of_timm(), tmp_path / "again")
    assert not (tmp_path / "again/preprocessor_config.json").exists()


def test_weights_in_half_precision_and_in_several_files(tmp_path: Path):
    model = of_transformers().half()
    model.save_pretrained(tmp_path, max_shard_size=4_000)
    assert not (tmp_path / "model.safetensors").exists()
    opened = gohsp.open_model(tmp_path)
    assert next(opened.parameters()).dtype == torch.float16
    assert same(opened.float(), model.float())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    for name in ("../x.safetensors", "/etc/passwd", "x.bin", 3):
        rewritten(tmp_path, "model.safetensors.index.json", weight_map={**index["weight_map"], first: name})
        with pytest.raises(CheckpointError, match=r"must name \.safetensors files beside it"):
            gohsp.open_model(tmp_path)


def test_its_pickle_is_read_only_when_asked_for(vit: Path, caplog: pytest.LogCaptureFixture):
    state = load_file(vit / "model.safetensors")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, vit / "pytorch_model.bin")
    expected = gohsp.open_model(vit)
    (vit / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors .*weights=.*pytorch_model\.bin'"):
        gohsp.open_model(vit)
    assert same(gohsp.open_model(vit, weights=vit / "pytorch_model.bin"), expected)
    assert "the prefix 'module.'" in caplog.text
    torch.save({**state, "extra.weight": torch.ones(2), "positions": torch.arange(3)}, vit / "more.pt")
    assert same(gohsp.open_model(vit, weights=vit / "more.pt"), expected)
    assert "which is left out: extra.weight" in caplog.text
    state["classifier.weight"] = torch.ones(3, 3)
    del state["classifier.bias"]
    torch.save(state, vit / "less.pt")
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' is missing; 'classifier\.weight' is of another"):
        gohsp.open_model(vit, weights=vit / "less.pt")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": None}, CheckpointError, "'architectures' must be a list"),
        ({"architectures": ["ViTModel", "DeiTModel"]}, CheckpointError, "'architectures' must be a list"),
        ({"architectures": ["BertModel"]}, CheckpointError, "'BertModel' is none of transformers' that can be made"),
        ({"architectures": ["os.system"]}, CheckpointError, "'os.system' is none"),
        ({"architectures": ["AutoModel"]}, CheckpointError, "'AutoModel' is none"),
        ({"hidden_size": "16"}, CheckpointError, "'hidden_size' is '16'"),
        ({"hidden_size": 32}, CheckpointError, "is of another shape"),
        (
            {"num_hidden_layers": 40, "hidden_size": 2**14, "intermediate_size": 2**17},
            CheckpointError,
            "billion parameters",
        ),
        ({"hidden_act": "os.system"}, CheckpointError, "'hidden_act'"),
        ({"num_hidden_layers": 0}, UnsupportedModelError, "no block that can be pruned"),
    ],
)
def test_what_its_config_may_not_say(vit: Path, changes: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        gohsp.open_model(rewritten(vit, **changes))


def test_code_of_a_folder_does_not_run(vit: Path, tmp_path: Path):
    for file in ("modeling.py", "processing.py"):
        (vit / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rewritten(vit, auto_map={"AutoModelForImageClassification": "modeling.Model"})
    rewritten(vit, "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing.Processor"})
    gohsp.save(gohsp.open_model(vit), tmp_path / "small")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in (tmp_path / "small/preprocessor_config.json").read_text()


RESAMPLED: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {"interpolate_pos_encoding": True},
    "DeiTForImageClassification": {"interpolate_pos_encoding": True},
    "CLIPVisionModelWithProjection": {"interpolate_pos_encoding": True},
    "SiglipVisionModel": {"interpolate_pos_encoding": True},
    "Dinov2Model": {},  # which always does it
}


@pytest.mark.parametrize("name", RESAMPLED)
def test_position_embeddings_are_resampled_as_the_model_itself_does(tmp_path: Path, name: str, caplog: Any):
    cls = getattr(library(), name)
    model = alive(cls(cls.config_class(**HF)))
    model.save_pretrained(tmp_path)
    opened = gohsp.open_model(rewritten(tmp_path, image_size=32))
    assert "position embeddings are resampled" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tensor_in(model(images, **RESAMPLED[name]))
        torch.testing.assert_close(tensor_in(opened(images)), expected, rtol=0, atol=1e-5)


# What happens to an image


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((60, 40), Image.Resampling.BICUBIC)


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squash": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 2}),
    "signed": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5}),
    "plain": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_normalize": False}),
    "crop": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "resample": 3},
    ),
    "squash and crop": (
        "DeiTImageProcessor",
        {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}, "resample": 3},
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_becomes_what_the_image_processor_makes_of_it(vit: Path, name: str):
    kind, settings = PROCESSORS[name]
    processor = getattr(library(), kind)(**settings, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1])
    processor.save_pretrained(vit)
    ours = eval_transform(Preprocessing.from_model(gohsp.open_model(vit)))(picture())
    theirs = torch.as_tensor(np.asarray(processor(picture(), return_tensors="np")["pixel_values"][0]))
    assert ours.shape == theirs.shape == (3, 16, 16)
    # Theirs resizes tensors or pictures, by version, and either rounds to one of 256 values.
    step = 1 / 255 / 0.1 if name != "plain" else 1 / 255
    assert (ours - theirs).abs().mean() < step


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 16}, ("squash", 1.0)),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "do_center_crop": True, "crop_size": 16},
         ("center", 1.0)),
        ({"feature_extractor_type": "DeiTFeatureExtractor", "size": 20, "do_center_crop": True, "crop_size": 16},
         ("squash", 0.8)),
    ],
)  # fmt: skip
def test_files_of_earlier_versions_give_one_number(vit: Path, file: dict[str, Any], expected: tuple[str, float]):
    content = {**file, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (vit / "preprocessor_config.json").write_text(json.dumps(content))
    found = Preprocessing.from_model(gohsp.open_model(vit))
    assert (found.crop_mode, found.crop_pct, found.interpolation) == (*expected, "bicubic")


def test_images_are_of_the_processors_size_where_a_model_takes_any(tmp_path: Path):
    of_transformers("Dinov2", image_size=32).save_pretrained(tmp_path / "dinov2")
    library().ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "dinov2")
    model = gohsp.open_model(tmp_path / "dinov2")
    assert Preprocessing.from_model(model).image_size == 24
    assert gohsp.describe(model).sublayers[0].tokens == 10
    gohsp.save(model, tmp_path / "saved")
    assert Preprocessing.from_model(gohsp.load(tmp_path / "saved")).image_size == 24


def test_a_processor_that_does_not_fit_is_refused(vit: Path):
    rewritten(vit, "preprocessor_config.json", size={"height": 24, "width": 24})
    with pytest.raises(CheckpointError, match=r"cannot compute an image of \[3, 24, 24\]"):
        gohsp.open_model(vit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 10**6, "width": 16}}, "size"),
        ({"size": None}, "'size' must be a number"),
        ({"do_resize": False}, "must be resized"),
        ({"size": {"shortest_edge": 16}}, "must be cropped"),
        ({"do_center_crop": True, "crop_size": 32}, "'crop_size'"),
        ({"image_std": [0.0] * 3}, "image_std"),
        ({"image_mean": None}, "'image_mean' and 'image_std'"),
        ({"resample": 9}, "resample"),
        ({"image_processor_type": "os.system"}, "image_processor_type"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(vit: Path, changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=f"preprocessor_config.*{message}"):
        gohsp.open_model(rewritten(vit, "preprocessor_config.json", **changes))


def test_without_a_processor_a_run_says_what_to_do(vit: Path, tmp_path: Path):
    (vit / "preprocessor_config.json").unlink()
    model: Any = gohsp.open_model(vit)
    for given in (model, vit):
        with pytest.raises(DataError, match=r"preprocessor_config\.json, or set model\.pretrained_cfg"):
            gohsp.run(given, "digits", "params=-10%", tmp_path / "run", config=ONESHOT)


# Runs


def test_a_run_prunes_trains_and_scores_a_folder_of_transformers(vit: Path, tmp_path: Path, capsys: Any):
    rewritten(vit, id2label={str(i): f"LABEL_{i}" for i in range(10)})  # which are no names
    config = from_mapping(
        {
            "device": "cpu",
            "method": "finetune",
            "at": "vit",
            "precision": "no",
            "finetune": {"epochs": 0},
            "calibration": {"images": 32, "holdout": 8},
            "latency": {"batch_size": 2},
        }
    )
    result = gohsp.run(vit, "digits", "params=-10%", tmp_path / "run", config=config)
    assert json.loads((tmp_path / "run/config.json").read_text())["at"] == "vit"
    assert not result.model._forward_pre_hooks
    assert result.report.model.library == "transformers"
    assert result.report.budget.achieved <= result.report.budget.limit
    assert same(gohsp.load(tmp_path / "run"), result.model)
    assert (tmp_path / "run/preprocessor_config.json").exists()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", "digits", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["top1"] == pytest.approx(result.report.pruned.top1)


# Folders of timm, and the hub


def test_a_folder_of_timm_is_opened(folder_of_timm: Path):
    model = gohsp.open_model(folder_of_timm)
    assert same(model, of_timm())
    assert Preprocessing.from_model(model).mean == (0.4, 0.4, 0.4)
    assert models.class_names(model) == tuple(f"class {i}" for i in range(10))
    torch.save(of_timm().state_dict(), folder_of_timm / "other.pt")
    assert same(gohsp.open_model(folder_of_timm, weights=folder_of_timm / "other.pt"), of_timm())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet18"}, "is none of timm"),
        ({"architecture": "hf-hub:me/vit"}, "is none of timm"),
        ({"architecture": 3}, "'architecture' must be a name"),
        ({"pretrained_cfg": [1]}, "'pretrained_cfg' a table"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' is no argument"),
        ({"model_args": {**SMALL, "depth": 3}}, r"'blocks\.2\.\S+' is missing"),
        ({"pretrained_cfg": {"mean": "x"}}, "'mean' is 'x'"),
    ],
)
def test_what_timms_config_may_not_say(folder_of_timm: Path, changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        gohsp.open_model(rewritten(folder_of_timm, **changes))


def test_a_folder_of_nobody_says_what_was_looked_for(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"'format_version'.*'architectures'.*'architecture', as timm"):
        gohsp.open_model(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Put a folder into the hub's cache, which is all that there is of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(identifier: str, folder: Path) -> None:
        repository = tmp_path / "hub" / f"models--{identifier.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        os.replace(folder, repository / "snapshots" / "c0ffee")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c0ffee")

    return put


def test_the_hubs_folders_are_opened_by_what_they_are(
    hub: Callable[[str, Path], None], vit: Path, folder_of_timm: Path, tmp_path: Path
):
    gohsp.save(of_timm(), tmp_path / "saved")
    for name, folder in {"me/vit": vit, "me/timm": folder_of_timm, "me/ours": tmp_path / "saved"}.items():
        expected = gohsp.open_model(folder)
        hub(name, folder)
        assert same(gohsp.open_model(name, pretrained=True), expected)
    with pytest.raises(CheckpointError, match="if its pretrained weights are asked for"):
        gohsp.open_model("me/vit")
    with pytest.raises(CheckpointError, match="neither a local folder nor a hub repository that can be reached"):
        gohsp.open_model("me/other", pretrained=True)
    with pytest.raises(CheckpointError, match="brings its own weights and arguments"):
        gohsp.open_model("me/vit", pretrained=True, arguments={"img_size": 8})


# torchvision


def of_torchvision(**options: Any) -> Any:
    return gohsp.open_model("torchvision:vit_b_16", arguments=TORCHVISION, **options)


def test_a_name_of_torchvision_is_opened(tmp_path: Path):
    model = alive(of_torchvision())
    assert type(model).__module__ == "torchvision.models.vision_transformer"
    found = Preprocessing.from_model(model)
    assert (found.image_size, found.crop_pct, found.interpolation) == (16, 0.875, "bilinear")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "w.pth")
    assert same(of_torchvision(weights=tmp_path / "w.pth"), model)
    torch.save(model.state_dict() | {"heads.head.weight": torch.ones(3, 16)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"'heads\.head\.weight' is \[3, 16\]"):
        of_torchvision(weights=tmp_path / "other.pth")
    new = of_torchvision(weights=tmp_path / "other.pth", new_classifier=True)
    assert torch.equal(new.conv_proj.weight, model.conv_proj.weight)
    gohsp.save(gohsp.prune(model, torch.randn(32, 3, 16, 16), "params=-10%", config=ONESHOT).model, tmp_path / "small")
    assert Preprocessing.from_model(gohsp.load(tmp_path / "small")) == found


def test_torchvisions_own_weights_are_read_as_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/vit_b_16-c867db91.pth"
    path.parent.mkdir(parents=True)
    model = alive(of_torchvision())
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)  # as those files have it
        state[name] = tensor
    torch.save(state, path)
    assert same(of_torchvision(pretrained=True), model)
    path.write_bytes(malicious(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match="of torchvision's 'vit_b_16' cannot be fetched"):
        of_torchvision(pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_a_swin_of_torchvision_is_opened_and_loaded_in_one_line(tmp_path: Path):
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": [7, 7], "num_classes": 10}
    for name in ("swin_t", "swin_v2_t"):
        model = alive(gohsp.open_model(f"torchvision:{name}", arguments=sizes))
        assert type(model).__module__ == "torchvision.models.swin_transformer"
        side = 224 if name == "swin_t" else 256
        assert Preprocessing.from_model(model).image_size == side
        torch.save(model.state_dict(), tmp_path / "w.pth")
        assert same(gohsp.open_model(f"torchvision:{name}", arguments=sizes, weights=tmp_path / "w.pth"), model, 64)
        widths = gohsp.describe(model).widths
        widths["features.1.0.mlp"] = replace(widths["features.1.0.mlp"], units=40)
        models.resize(model, widths)
        gohsp.save(alive(model), tmp_path / name)
        loaded = gohsp.load(tmp_path / name)
        assert same(loaded, model, 64)
        assert Preprocessing.from_model(loaded).image_size == side


def test_position_embeddings_of_torchvision_are_resampled_by_its_own_function(tmp_path: Path, caplog: Any):
    model = alive(of_torchvision())
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "w.pth")
    larger = {**TORCHVISION, "image_size": 32}
    opened = gohsp.open_model("torchvision:vit_b_16", arguments=larger, weights=tmp_path / "w.pth")
    expected = interpolate_embeddings(32, 8, dict(model.state_dict()))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    assert "position embeddings are resampled to 32 px" in caplog.text


@pytest.mark.parametrize("name", ["torchvision:", "torchvision:vit_b_61", "torchvision:resnet18", "torchvision:a/b"])
def test_other_names_of_torchvision_are_refused(name: str):
    with pytest.raises(CheckpointError, match=r"vit_b_16"):
        gohsp.open_model(name)


# Pickles


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def malicious(path: Path) -> bytes:
    return pickle.dumps({"head.weight": torch.ones(1), "state": Evil(path)})


def opened(path: Path, **arguments: Any) -> Any:
    return gohsp.open_model(NAME, weights=path, arguments={**SMALL, **arguments})


def wrapped(content: Callable[[dict[str, Tensor]], Any]) -> Any:
    return content(dict(of_timm().state_dict()))


CONTENTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "deep": lambda state: {"ckpt": {"state_dict": {f"module.{k}": v for k, v in state.items()}}},
    "training": lambda state: {
        "state_dict": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1}]},
        "loss": {"center": torch.ones(3)},
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
    },
    "parameters": lambda state: {k: nn.Parameter(v) for k, v in state.items()},
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_found_where_they_lie(tmp_path: Path, name: str, zipped: bool):
    path = tmp_path / "w.pth"
    torch.save(wrapped(CONTENTS[name]), path, _use_new_zipfile_serialization=zipped)
    assert same(opened(path), of_timm())


def test_position_embeddings_of_pickled_weights_are_resampled(tmp_path: Path):
    torch.save(of_timm().state_dict(), tmp_path / "w.pth")
    save_file(of_timm().state_dict(), tmp_path / "w.safetensors")
    assert same(opened(tmp_path / "w.pth", img_size=32), opened(tmp_path / "w.safetensors", img_size=32), 32)


def _looped(_: Any) -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    return loop


AMBIGUOUS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "two": (lambda state: {"model": state, "model_ema": dict(state)}, r"under \['model', 'model_ema'\]"),
    "none": (lambda _: {"epoch": 3}, "hold no table of names and tensors"),
    "number": (lambda _: 3, "hold no table"),
    "loop": (_looped, "hold no table"),
    "bytes": (lambda state: state | {"head.weight": torch.ones(10, 16, dtype=torch.int8)}, "is torch.int8"),
    "small": (lambda state: state | {"head.weight": torch.ones(10, 16).to(torch.float8_e4m3fn)}, "float8"),
    "sparse": (lambda state: state | {"head.weight": torch.eye(10, 16).to_sparse()}, "sparse"),
    "meta": (lambda state: state | {"head.weight": torch.ones(10, 16, device="meta")}, "without values"),
    "module": (lambda _: nn.Linear(2, 2), "it holds objects"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_pickled_weights_that_leave_a_doubt_are_refused(tmp_path: Path, name: str):
    content, message = AMBIGUOUS[name]
    torch.save(wrapped(content), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_code_in_pickled_weights_does_not_run(tmp_path: Path, suffix: str):
    path, mark = tmp_path / f"w{suffix}", tmp_path / "ran"
    path.write_bytes(malicious(mark))
    with pytest.raises(CheckpointError, match="cannot be read as tensors and plain values alone"):
        opened(path)
    torch.save({**of_timm().state_dict(), "evil": Evil(mark)}, path)
    with pytest.raises(CheckpointError, match="cannot be read as tensors and plain values alone"):
        opened(path)
    assert not mark.exists()
    pickle.loads(malicious(mark))  # noqa: S301 (which it would have done)
    assert mark.exists()


def test_damaged_pickles_end_in_one_error(tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save(of_timm().state_dict(), path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(whole[: random.integers(len(whole))] if number % 2 else whole)
        for place in random.integers(0, max(len(damaged), 1), 20 if damaged else 0):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(gohsp.GohspError):  # and in no other; or a byte of a weight is another
            opened(path)
