"""A part of a model is pruned, and the rest of it stays as it is: towers of CLIP and SigLIP, a backbone in a module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import gohsp
from gohsp import cli
from gohsp.config import from_mapping
from gohsp.errors import CheckpointError, DataError, PlanError, UnsupportedModelError
from gohsp.structure import FfnWidths

IMAGES = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FEW = from_mapping({"precision": "no", "calibration": {"images": 16, "holdout": 4}})
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8}
WORDS = torch.tensor([[3, 7, 9, 2], [4, 4, 1, 2], [8, 30, 41, 2]])


def clip() -> Any:
    library: Any = pytest.importorskip("transformers")
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    return library.CLIPModel(library.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def siglip() -> Any:
    library: Any = pytest.importorskip("transformers")
    text = {**TEXT, "projection_size": 32}
    return library.SiglipModel(library.SiglipConfig(text_config=text, vision_config=VISION))


def open_clip() -> Any:
    pytest.importorskip("open_clip")
    library: Any = importlib.import_module("open_clip.model")
    vision = library.CLIPVisionCfg(layers=2, width=32, head_width=8, mlp_ratio=1.5, patch_size=8, image_size=32)
    return library.CLIP(16, vision, library.CLIPTextCfg(context_length=4, vocab_size=50, width=32, heads=4, layers=2))


TOWERS = {"clip": (clip, "vision_model"), "siglip": (siglip, "vision_model"), "open_clip": (open_clip, "visual")}


def alive(model: nn.Module) -> Any:
    """No weight stays at a value that an initialiser would give it too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@torch.no_grad()
def both(name: str, model: Any) -> list[Tensor]:
    """What a model makes of images and of texts."""
    if name == "open_clip":
        return list(model(IMAGES[:2], WORDS)[:2])
    output = model(input_ids=WORDS, pixel_values=IMAGES[:2])
    return [output.image_embeds, output.text_embeds]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def narrowed(model: nn.Module, at: str) -> dict[str, Any]:
    """Widths of a part, its FFNs half as wide."""
    return halved(gohsp.describe(model, at=at))


def halved(network: gohsp.Network) -> dict[str, Any]:
    widths = network.widths.items()
    return {name: FfnWidths(units=of.units // 2) if isinstance(of, FfnWidths) else of for name, of in widths}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_pruned_and_the_other_one_stays(name: str, tmp_path: Path) -> None:
    make, at = TOWERS[name]
    model = alive(make())
    _, text = both(name, model)
    result = gohsp.prune(model, IMAGES, "params=-1%", at=at, widths=narrowed(model, at), config=FEW)
    assert {sub.split(".")[0] for sub in result.widths} == {at}
    assert result.widths != result.network.widths
    assert gohsp.count_params(result.network) == size(model)  # the budget is of the whole
    assert size(result.model) <= 0.99 * size(model)
    assert not result.model._forward_pre_hooks
    images, words = both(name, result.model)
    assert torch.equal(words, text)
    gohsp.save(result.model, tmp_path)
    loaded = gohsp.load(tmp_path, into=make() if name == "open_clip" else None)
    assert type(loaded) is type(model)
    for one, other in zip(both(name, loaded), (images, words), strict=True):
        torch.testing.assert_close(one, other)
    assert gohsp.describe(loaded).widths == result.widths  # and can be cut again


def test_the_parts_take_a_part() -> None:
    model, config = alive(clip()), from_mapping({"precision": "no", "at": "vision_model"})
    network = gohsp.describe(model, at="vision_model")
    assert list(gohsp.rank(model, IMAGES, config=config).scores) == [sub.name for sub in network.attentions]
    curves = gohsp.measure_curves(model, IMAGES, config=config)
    widths = gohsp.allocate(model, curves, "params=-10%", config=config)
    cut = gohsp.cut(model, IMAGES, widths, config=config)
    small = gohsp.compact(cut.model, cut.kept, IMAGES[:4], at="vision_model").model
    assert gohsp.describe(small, at="vision_model").widths == widths
    assert gohsp.heal(small, model, IMAGES, config=config).curve
    for made in (cut.model, small):
        assert not made._forward_pre_hooks


def test_of_both_towers_only_what_sees_images_is_described() -> None:
    network = gohsp.describe(clip())
    assert {name.split(".")[0] for name in network.widths} == {"vision_model"}
    layer = gohsp.describe(clip(), at="vision_model.encoder.layers.1")
    assert list(layer.blocks) == ["vision_model.encoder.layers.1"]
    assert gohsp.count_params(layer) == gohsp.count_params(network)
    assert gohsp.count_macs(layer) == gohsp.count_macs(network)


def test_what_was_compiled_in_place_is_watched_as_it_is_written() -> None:
    def backend(*_: Any) -> Any:
        raise AssertionError("it was compiled")

    model = clip()
    expected = gohsp.describe(model)
    model.compile(backend=backend)
    called = model._compiled_call_impl
    assert gohsp.describe(model) == expected
    assert model._compiled_call_impl is called


@pytest.mark.parametrize(
    ("make", "at", "error", "message"),
    [
        (clip, "visual_model", PlanError, r"no module of this .*CLIPModel; did you mean 'vision_model'\?"),
        (clip, "text_model", UnsupportedModelError, "no image passes through the blocks of module 'text_model'"),
        (clip, "visual_projection", UnsupportedModelError, "module 'visual_projection', a .*Linear, has no block that"),
        (open_clip, "transformer", UnsupportedModelError, "no image passes through the blocks of module 'transformer'"),
    ],
)
def test_what_at_may_not_name(make: Any, at: str, error: type[Exception], message: str) -> None:
    model = make()
    for call in (gohsp.describe, lambda model, at: gohsp.prune(model, IMAGES, "params=-10%", at=at)):
        with pytest.raises(error, match=message):
            call(model, at=at)


# What a model takes besides images


class Scaled(nn.Module):
    """Images, with a number for each and a table for all."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=2, num_classes=5
        )
        self.called: list[tuple[tuple[int, ...], ...]] = []

    def forward(self, images: Tensor, scale: Tensor, table: Tensor, *, flag: bool) -> Tensor:
        assert flag
        self.called.append((tuple(scale.shape), tuple(table.shape)))
        return self.backbone(images * scale[:, None, None, None]) @ table


def test_a_model_that_takes_more_than_images_is_called_by_name(tmp_path: Path) -> None:
    model, table = alive(Scaled()), torch.eye(5)
    given = [
        {"images": batch, "scale": torch.full((len(batch),), 2.0), "table": table, "flag": True, "label": 3}
        for batch in IMAGES.split(10)
    ]
    network = gohsp.describe(model, given[0])
    assert gohsp.count_params(network) == size(model)
    options = {"objective": "features", "config": FEW}
    result = gohsp.prune(model, given, "params=-1%", widths=halved(network), **options)
    assert {len(scale) for scale, _ in model.called} == {1}  # images of noise or alone, one at a time
    assert {table for _, table in model.called} == {(5, 5)}
    alone = model.backbone
    ready = gohsp.prune(alone, 2 * IMAGES, "params=-1%", widths=halved(gohsp.describe(alone)), **options)
    assert {f"backbone.{name}": of for name, of in ready.kept.items()} == result.kept
    with pytest.raises(UnsupportedModelError, match=r"missing .*scale"):
        gohsp.save(result.model, tmp_path)
    gohsp.save(result.model, tmp_path, images=given[0])
    called = {"scale": torch.ones(20), "table": table, "flag": True}
    with torch.no_grad():
        assert torch.equal(gohsp.load(tmp_path, into=Scaled())(IMAGES, **called), result.model(IMAGES, **called))
    with pytest.raises(UnsupportedModelError, match=r"missing .*scale.*mappings of all that it takes by name"):
        gohsp.prune(model, IMAGES, "params=-1%", config=FEW)


def test_texts_given_by_name_reach_the_model() -> None:
    model, seen = alive(clip()), []
    widths = narrowed(model, "vision_model")
    model.text_model.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True)
    given = [{"pixel_values": IMAGES, "input_ids": WORDS, "label": 3}]
    objective = lambda returned: returned.logits_per_image  # noqa: E731
    options = {"at": "vision_model", "widths": widths, "objective": objective}
    result = gohsp.prune(model, given, "params=-1%", config=FEW, **options)
    assert result.fidelity.distance > 0
    assert all(torch.equal(words, WORDS) for words in seen)
    with pytest.raises(DataError, match="a mapping of images must have one of the keys"):
        gohsp.describe(model, {"input_ids": WORDS})


# The rest of a model may be anything


class Odd(nn.Module):
    """A block that is known, with an attention that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Scaled().backbone
        self.decoder = Block(5, 1)
        self.decoder.attn = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder.attn(self.backbone(images))


def test_what_is_elsewhere_need_not_be_known(tmp_path: Path) -> None:
    model = alive(Odd())
    with pytest.raises(UnsupportedModelError, match=r"'decoder\.attn' is a .*Linear"):
        gohsp.prune(model, IMAGES, "params=-20%", config=FEW)
    result = gohsp.prune(model, IMAGES, "params=-1%", at="backbone", widths=narrowed(model, "backbone"), config=FEW)
    with pytest.raises(UnsupportedModelError, match=r"'decoder\.attn' is a .*Linear"):
        gohsp.save(result.model, tmp_path)
    gohsp.save(result.model, tmp_path, at="backbone")
    loaded = gohsp.load(tmp_path, into=Odd())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    with pytest.raises(CheckpointError, match="at names 'backbone'"):
        gohsp.load(tmp_path, into=timm.create_model("vit_tiny_patch16_224"))


def test_a_folder_of_two_towers_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library: Any = pytest.importorskip("transformers")
    model = alive(clip())
    model.save_pretrained(tmp_path / "clip")
    processor = library.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "clip")
    opened = gohsp.open_model(tmp_path / "clip")
    assert all(torch.equal(a, b) for a, b in zip(both("clip", opened), both("clip", model), strict=True))
    rank = ["rank", str(tmp_path / "clip"), "--data", "digits", "--at", "vision"]
    assert cli.main(rank) == 1
    assert "did you mean 'vision_model'?" in " ".join(capsys.readouterr().err.split())


def test_the_page_prunes_one_tower_of_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "families.md"
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "(clip, " in code)
    model, ran = alive(clip()), {"gohsp": gohsp, "images": IMAGES}
    exec(code, ran | {"clip": model})
    assert size(gohsp.load("small")) <= 0.8 * size(model)
