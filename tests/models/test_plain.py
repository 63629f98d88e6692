"""Uniform pruning: what settings of a library can say, and models that their library loads without gohsp."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import HF, SMALL, ZOO, images_for, made, of_timm, of_transformers

import gohsp
from gohsp import steps
from gohsp.config import from_mapping
from gohsp.core.allocation import WidthSettings
from gohsp.errors import BudgetError, UnsupportedModelError
from gohsp.files import save_tensors
from gohsp.models import describe, sayable
from gohsp.models.libraries.shape import Shape
from gohsp.structure import PARAMS, AttentionWidths, Ffn, FfnWidths, Kind, cost_of, excluding

CONFIG = from_mapping(
    {"precision": "no", "calibration": {"images": 24, "holdout": 4}, "widths": {"multiple": 4, "min_width": 4}}
)
ALL: set[Kind] = {"head", "qk", "vo", "ffn"}
LOADED = ("timm vit", "transformers vit", "transformers dinov2", "transformers clip", "torchvision vit")

BY_THEMSELVES = """
import json, sys
sys.modules["gohsp"] = None
import timm, torch, transformers
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

def opened(folder):
    config = json.load(open(folder + "/config.json"))
    if "model_args" in config:
        return timm.create_model("local-dir:" + folder, pretrained=True)
    if "architectures" in config:
        return getattr(transformers, config["architectures"][0]).from_pretrained(folder)
    model = VisionTransformer(**config["arguments"])
    model.load_state_dict(load_file(folder + "/model.safetensors"), strict=True)
    return model

for folder in sys.argv[1:]:
    known = load_file(folder + ".safetensors")
    with torch.no_grad():
        found = opened(folder).eval()(known["images"])
    found = found if torch.is_tensor(found) else found[0]
    print(float((found - known["outputs"]).abs().max() / known["outputs"].abs().max()))
"""


@pytest.fixture(scope="module", autouse=True)
def _a_further_model() -> Any:
    """One whose gated FFN counts each unit twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "timm swiglu", of_timm("vit_giant_patch14_dinov2", mlp_ratio=3))
        yield


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def saved_uniform(model: nn.Module, images: Tensor, folder: Path) -> gohsp.Pruned:
    result = gohsp.prune(model, images, "params=-12%", uniform=True, config=CONFIG)
    gohsp.save_plain(result.model, folder)
    return result


def as_the_page_says(model: nn.Module, images: Tensor, folder: Path) -> gohsp.Pruned:
    """The page's example, which saves to ``plain``."""
    page = Path(__file__).parents[2] / "docs" / "families.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    code = next(code for code in blocks if "save_plain" in code)
    ran: dict[str, Any] = {"gohsp": gohsp, "model": model, "images": images}
    with contextlib.chdir(folder.parent):
        exec(code, ran)
    (folder.parent / "plain").rename(folder)
    return ran["result"]


@torch.no_grad()
def test_a_uniform_model_is_loaded_by_its_library_alone(tmp_path: Path) -> None:
    """Pruned and saved here; loaded in a process that cannot import gohsp."""
    pytest.importorskip("transformers")
    for name in LOADED:
        model, images = made(name), images_for(name, 28)
        result = (as_the_page_says if name == LOADED[0] else saved_uniform)(model, images, tmp_path / name)
        assert type(result.model) is type(model)
        assert not any(type(module).__module__.startswith("gohsp") for module in result.model.modules())
        assert len({of for of in result.widths.values() if isinstance(of, FfnWidths)}) == 1
        assert len({(of.heads, of.qk, of.qk - of.vo) for of in result.widths.values() if hasattr(of, "qk")}) == 1
        assert result.widths == describe(result.model).widths != describe(model).widths
        known = {"images": images[:2], "outputs": first(result.model(images[:2])).contiguous()}
        save_tensors(tmp_path / f"{name}.safetensors", known)
    folders = [str(tmp_path / name) for name in LOADED]
    done = subprocess.run([sys.executable, "-c", BY_THEMSELVES, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == len(LOADED)
    assert max(differences) <= 1e-5


SAYS: dict[str, set[Kind]] = {
    "timm vit": {"ffn"},
    "timm swiglu": {"ffn"},
    "timm eva02": {"ffn"},
    "timm beit": {"ffn"},
    "transformers vit": ALL,
    "transformers dinov2": ALL,
    "transformers dinov2 swiglu": {"head", "qk", "vo"},  # a whole ratio gives no even number of units here
    "transformers dinov3": {"ffn"},
    "transformers clip": {"ffn"},
    "torchvision vit": {"ffn"},
    "torchvision swin": {"ffn"},
}


def of_version_5() -> bool:
    return int(pytest.importorskip("transformers").__version__.partition(".")[0]) >= 5


@pytest.mark.parametrize("name", SAYS)
def test_what_settings_cannot_say_is_held_and_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = SAYS[name]
    if ZOO[name].needs == "transformers" and not of_version_5():
        expected = {"ffn"}  # no head_dim yet, and any ratio
    model = made(name)
    network = describe(model)
    with caplog.at_level(logging.WARNING):
        found = sayable(model, network, WidthSettings(multiple=4, min_width=4))
    may = {kind for sub in network.present for kind in sub.prunable}
    assert {kind for sub in found.present for kind in sub.prunable} == expected & may
    assert not any(sub.removable for sub in found.present)
    assert ("settings cannot say" in caplog.text) == (not may <= expected)
    assert ("heads" in caplog.text) == ("head" not in expected)


def test_dinov2_takes_whole_ratios_alone_in_version_5() -> None:
    whole = of_version_5()
    entry = of_transformers("Dinov2Config", "Dinov2Model", mlp_ratio=3)
    model = entry.make()
    network = sayable(model, describe(model), WidthSettings())
    later = steps._with_limits(describe(model), network, SimpleNamespace(config=CONFIG))  # type: ignore[arg-type]
    for of in (network, later):
        assert {sub.step for sub in of.present if isinstance(sub, Ffn)} == {HF["hidden_size"] if whole else 1}


def pooled() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SMALL, global_pool="map", class_token=False, fc_norm=False)


class Around(nn.Module):
    """Somebody's own module with a library's model inside."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"backbone": backbone})

    def forward(self, images: Tensor) -> Tensor:
        return 2 * first(self.body["backbone"](images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pooled, "timm's own settings .* what is outside the blocks would change with them"),
        (lambda: Around(made("torch encoder layer")), "no model of timm, torchvision, transformers holds all blocks"),
    ],
)
def test_a_model_whose_settings_can_say_nothing_is_refused_before_the_work(make: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        gohsp.prune(make(), images_for("timm vit"), "params=-10%", uniform=True)


def test_a_budget_that_needs_more_than_settings_can_say_names_the_smallest() -> None:
    model = made("timm vit")
    network = excluding(describe(model), ["head", "qk", "vo"])
    units = {n: replace(of, units=4) if isinstance(of, FfnWidths) else of for n, of in network.widths.items()}
    least = int(cost_of(network, units, PARAMS))
    with pytest.raises(
        BudgetError, match=rf"the smallest possible uniform model \(units cut\) has {least:,} parameters"
    ):
        gohsp.prune(model, images_for("timm vit"), "params=-60%", uniform=True, config=CONFIG)


def test_inside_a_module_of_ones_own_the_library_makes_its_part(tmp_path: Path) -> None:
    model, images = Around(made("torchvision vit")), images_for("timm vit", 28)
    curves = gohsp.measure_curves(model, images, config=CONFIG)  # serve uniform pruning, too
    result = gohsp.prune(model, images, "params=-12%", uniform=True, curves=curves, config=CONFIG)
    backbone = result.model.get_submodule("body.backbone")
    assert isinstance(backbone.get_submodule("encoder.layers.encoder_layer_0.self_attention"), nn.MultiheadAttention)
    widths = gohsp.allocate(model, curves, "params=-12%", config=replace(CONFIG, uniform=True))
    assert widths == result.widths
    gohsp.save_plain(backbone, tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    assert arguments["mlp_dim"] == widths["body.backbone.encoder.layers.encoder_layer_0.mlp"].units < 48  # type: ignore[union-attr]


def test_blocks_that_differ_become_alike() -> None:
    """A model that was cut freely, cut again: what its settings can say is tried for all sub-layers at once."""
    if not of_version_5():
        pytest.skip("transformers looks for head_dim since version 5")
    model = made("transformers vit")
    names = list(describe(model).widths)
    cut = [
        AttentionWidths(heads=3, qk=4, vo=8),
        FfnWidths(units=40),
        AttentionWidths(heads=4, qk=8, vo=8),
        FfnWidths(units=48),
    ]
    gohsp.models.resize(model, dict(zip(names, cut, strict=True)))
    found = sayable(model, describe(model), WidthSettings(multiple=4, min_width=4))
    assert {kind for sub in found.present for kind in sub.prunable} == ALL


@given(st.integers(1, 2048), st.integers(1, 9000), st.sampled_from([Fraction(1), Fraction(2), Fraction(3, 2)]))
def test_a_ratio_gives_just_these_hidden_units(dim: int, units: int, factor: Fraction) -> None:
    shape = Shape(dim=dim, heads=None, head_dim=None, ratio=Fraction(units, dim))
    ratio = shape.mlp_ratio(factor)
    assert shape.units == units
    assert ratio is not None
    assert int(dim * ratio) == int(units * factor)
