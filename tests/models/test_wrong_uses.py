"""What is no Vision Transformer, or none that can be pruned, is refused by name before any work."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gohsp
from gohsp.errors import NonFiniteError, UnsupportedModelError

IMAGES = torch.zeros(2, 3, 32, 32)


def of_transformers(config: str, model: str, **arguments: Any) -> nn.Module:
    library: Any = pytest.importorskip("transformers")
    return getattr(library, model)(getattr(library, config)(**arguments))


class Decoding(nn.Module):
    """Learnt queries that attend to an image's patches, as in detection transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.queries = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.zeros(1, 5, 32))
        layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.queries.expand(len(images), -1, -1), self.patch(images).flatten(2).mT)


class Encoding(nn.Module):
    """PyTorch's own layers, as asked for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, **{"batch_first": True, "norm_first": True, **arguments})
        self.patch, self.encoder = nn.Conv2d(3, 32, 8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.patch(images).flatten(2).mT).mean(1)


class DiffusionBlock(nn.Module):
    """timm's attention and FFN behind norms that the noise's level shifts and scales, as in diffusion transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(32, elementwise_affine=False), nn.Linear(1, 32)
        self.attn, self.mlp = timm.layers.Attention(32, 4), timm.layers.Mlp(32, 48)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x) + self.shift(level))
        return x + self.mlp(self.norm(x) + self.shift(level))


class Denoising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 32, 8, 8), nn.ModuleList([DiffusionBlock(), DiffusionBlock()])

    def forward(self, images: Tensor, level: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        for block in self.blocks:
            x = block(x, level)
        return x


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WRONG: dict[str, tuple[Any, str]] = {
    "a CNN": (lambda: timm.create_model("resnet18"), r"ResNet has no block that can be pruned"),
    "a text model": (
        lambda: of_transformers("BertConfig", "BertModel", vocab_size=50, **TEXT),
        r"BertModel has no block that can be pruned \(2 of its modules are .*BertLayer\)",
    ),
    "a text tower": (
        lambda: of_transformers("CLIPTextConfig", "CLIPTextModel", vocab_size=50, **TEXT),
        r"the model cannot compute an image of \[3, 32, 32\]",
    ),
    "a hybrid": (
        lambda: timm.create_model("maxvit_rmlp_pico_rw_256", img_size=32),
        r"MaxxVit has no block that can be pruned",
    ),
    "a diffusion transformer": (
        Denoising,
        r"Denoising has no block that can be pruned \(2 of .*DiffusionBlock\).*families\.register",
    ),
    "a decoder": (Decoding, r"no block that can be pruned \(2 of its modules are .*TransformerDecoderLayer\)"),
    "parallel branches": (
        lambda: timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        r"12 of its modules are .*ParallelScalingBlock",
    ),
    "no output projection": (
        lambda: of_vit_pytorch("vit", "ViT", heads=1, dim_head=32),
        r"module 'transformer\.layers\.0\.0' is a vit_pytorch\.vit\.Attention, which cannot be pruned",
    ),
    "another of vit_pytorch": (
        lambda: of_vit_pytorch("deepvit", "DeepViT", heads=4),
        r"DeepViT has no block that can be pruned",
    ),
    "tokens first": (
        lambda: Encoding(batch_first=False),
        r"MultiheadAttention with batch_first=False, which cannot be",
    ),
}


def of_vit_pytorch(file: str, name: str, **arguments: Any) -> Any:
    library = pytest.importorskip(f"vit_pytorch.{file}")
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "mlp_dim": 48}
    return getattr(library, name)(**sizes, **arguments).eval()


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused(name: str) -> None:
    make, message = WRONG[name]
    model = make()
    for call in (gohsp.describe, lambda model, images: gohsp.prune(model, [images], "params=-30%")):
        with pytest.raises(UnsupportedModelError, match=message):
            call(model, IMAGES)


def test_a_model_without_memory_is_described_but_not_pruned() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    assert gohsp.describe(model).attentions
    with pytest.raises(NonFiniteError, match="is on the meta device and holds no values; load the weights first"):
        gohsp.prune(model, [IMAGES], "params=-30%")
