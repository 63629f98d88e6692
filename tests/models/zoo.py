"""Tiny models of every family, with random weights; nothing of them comes from the network."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

SIDE = 32
SMALL = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 5}
HF = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SAM = {"mlp_dim": 48, "output_channels": 8, "window_size": 3, "global_attn_indexes": [1]}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "mlp_ratio": 2.0}


@dataclass(frozen=True)
class Entry:
    """A family's model.

    Attributes:
        make: Makes it.
        held: Kinds of unit that must stay.
        budget: One that it can meet.
        side: Height and width of its images.
        needs: A package that it is skipped without.
        same: Whether its classes are copies of another entry's, be it another library's, so that little of the contract
            says all of it.
    """

    make: Callable[[], nn.Module]
    held: frozenset[str] = frozenset()
    budget: str = "params=-15%"
    side: int = SIDE
    needs: str | None = None
    same: bool = False


def of_timm(name: str, *held: str, same: bool = False, **arguments: Any) -> Entry:
    side = arguments.pop("side", SIDE)
    budget = arguments.pop("budget", "params=-15%")
    given = {**SMALL, "mlp_ratio": 1.5, **arguments}
    given = {key: value for key, value in given.items() if value is not None}
    return Entry(lambda: timm.create_model(name, **given), frozenset(held), budget, side, same=same)


def of_transformers(config: str, model: str, *held: str, same: bool = False, **arguments: Any) -> Entry:
    given = arguments if config.startswith("Swin") else {**HF, **arguments}
    side = given["image_size"]

    def make() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**given))

    return Entry(make, frozenset(held), side=side, needs="transformers", same=same)


class Encoder(nn.Module):
    """PyTorch's own layers in a module of somebody's."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
        self.patch, self.head, self.num_classes = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 5), 5
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(images).flatten(2).mT).mean(1))


def torchvision_vit() -> nn.Module:
    return TorchvisionViT(SIDE, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)


def torchvision_swin(version: int) -> nn.Module:
    library: Any = importlib.import_module("torchvision.models.swin_transformer")
    later = {"block": library.SwinTransformerBlockV2, "downsample_layer": library.PatchMergingV2}
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return library.SwinTransformer(**sizes, mlp_ratio=2.0, num_classes=5, **(later if version == 2 else {}))


def vit_pytorch(name: str) -> nn.Module:
    library: Any = importlib.import_module("vit_pytorch")
    sizes = {"image_size": SIDE, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "mlp_dim": 48}
    model = getattr(library, name)(**sizes, num_classes=5)
    model.image_size = SIDE  # which it does not tell
    return model


def open_clip_tower() -> nn.Module:
    library: Any = importlib.import_module("open_clip.transformer")
    return library.VisionTransformer(SIDE, 8, 32, 2, 4, 1.5, ls_init_value=0.5, output_dim=8)


def dinov2(ffn: str) -> nn.Module:
    library: Any = importlib.import_module("dinov2.models.vision_transformer")
    block: Any = importlib.import_module("dinov2.layers.block").NestedTensorBlock
    attention: Any = importlib.import_module("dinov2.layers.attention").MemEffAttention
    return library.DinoVisionTransformer(
        img_size=SIDE,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=1.5,
        init_values=0.5,
        ffn_layer=ffn,
        block_fn=partial(block, attn_class=attention),
        block_chunks=0,
    )


def segment_anything() -> nn.Module:
    library: Any = importlib.import_module("segment_anything.modeling.image_encoder")
    return library.ImageEncoderViT(
        img_size=SIDE,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=1.5,
        out_chans=8,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )


ZOO: dict[str, Entry] = {
    "timm vit": of_timm("vit_tiny_patch16_224", same=True),  # which test_contract has
    "timm eva02": of_timm("eva02_tiny_patch14_224", "qk"),
    "timm eva": of_timm("eva_giant_patch14_224", "qk"),
    "timm dinov3": of_timm("vit_small_patch16_dinov3", "qk"),
    "timm rope": of_timm("vit_small_patch16_rope_224", "qk", same=True),
    "timm rope mixed": of_timm("vit_small_patch16_rope_mixed_224", "qk", "head", budget="params=-8%"),
    "timm perception": of_timm("vit_pe_core_tiny_patch16_384", "qk", same=True),
    "timm beit": of_timm("beit_base_patch16_224"),
    "timm relpos": of_timm("vit_relpos_small_patch16_224"),
    "timm relpos cls": of_timm("vit_relpos_medium_patch16_cls_224"),
    "timm relpos shared": of_timm("vit_srelpos_small_patch16_224", "head", budget="params=-8%"),
    "timm post-norm": of_timm("vit_base_patch16_rpn_224"),
    "timm eva post-norm": of_timm("eva02_enormous_patch14_clip_224", "qk", same=True),
    "timm relpos post-norm": of_timm("vit_relpos_small_patch16_rpn_224", same=True),
    "timm naflex": of_timm("naflexvit_base_patch16_gap", img_size=None),
    "timm sam": of_timm("samvit_base_patch16", "qk", window_size=3, global_attn_indexes=(1,), neck_chans=8),
    "timm sam classifier": of_timm("samvit_base_patch16_224", "qk", same=True),
    "timm swin": of_timm("swin_tiny_patch4_window7_224", side=64, **SWIN, img_size=64, patch_size=4, depth=None),
    "timm swin padded": of_timm("swin_tiny_patch4_window7_224", side=56, **SWIN, img_size=56, patch_size=4, depth=None),
    "timm swin v2": of_timm("swinv2_tiny_window8_256", "qk", side=64, **SWIN, img_size=64, patch_size=4, depth=None),
    "transformers vit": of_transformers("ViTConfig", "ViTForImageClassification", num_labels=5),
    "transformers deit": of_transformers("DeiTConfig", "DeiTForImageClassification", num_labels=5, same=True),
    "transformers ijepa": of_transformers("IJepaConfig", "IJepaModel", same=True),
    "transformers msn": of_transformers("ViTMSNConfig", "ViTMSNModel", same=True),
    "transformers dinov2": of_transformers("Dinov2Config", "Dinov2Model", mlp_ratio=2),
    "transformers dinov2 swiglu": of_transformers("Dinov2Config", "Dinov2Model", mlp_ratio=2, use_swiglu_ffn=True),
    "transformers dinov2 registers": of_transformers(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", mlp_ratio=2, num_labels=5, same=True
    ),
    "transformers dinov3": of_transformers("DINOv3ViTConfig", "DINOv3ViTModel", "qk", num_register_tokens=2),
    "transformers dinov3 gated": of_transformers(
        "DINOv3ViTConfig", "DINOv3ViTModel", "qk", same=True, use_gated_mlp=True
    ),
    "transformers clip": of_transformers("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    "transformers metaclip": of_transformers("MetaClip2VisionConfig", "MetaClip2VisionModel", same=True),
    "transformers siglip": of_transformers("SiglipVisionConfig", "SiglipVisionModel", same=True),
    "transformers beit": of_transformers(
        "BeitConfig", "BeitForImageClassification", use_relative_position_bias=True, num_labels=5
    ),
    "transformers swin": of_transformers(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=64,
        patch_size=4,
        num_labels=5,
        **{**SWIN, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "transformers swin v2": of_transformers(
        "Swinv2Config",
        "Swinv2ForImageClassification",
        "qk",
        same=True,
        image_size=64,
        patch_size=4,
        num_labels=5,
        **{**SWIN, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "transformers sam": of_transformers("SamVisionConfig", "SamVisionModel", "qk", same=True, **SAM),
    "transformers sam hq": of_transformers("SamHQVisionConfig", "SamHQVisionModel", "qk", same=True, **SAM),
    "transformers dpt": of_transformers(
        "DPTConfig",
        "DPTForSemanticSegmentation",
        num_labels=5,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    ),
    "torchvision vit": Entry(torchvision_vit),
    "torchvision swin": Entry(partial(torchvision_swin, 1), side=56),
    "torchvision swin v2": Entry(partial(torchvision_swin, 2), frozenset({"qk"}), side=64, same=True),
    "torch encoder layer": Entry(partial(Encoder, norm_first=True)),
    "torch encoder layer post-norm": Entry(partial(Encoder, norm_first=False)),
    "vit_pytorch vit": Entry(partial(vit_pytorch, "ViT"), needs="vit_pytorch"),
    "vit_pytorch simple": Entry(partial(vit_pytorch, "SimpleViT"), needs="vit_pytorch", same=True),
    "open_clip tower": Entry(open_clip_tower, needs="open_clip"),
    "dinov2": Entry(partial(dinov2, "mlp"), needs="dinov2"),
    "dinov2 gated": Entry(partial(dinov2, "swiglufused"), needs="dinov2", same=True),
    "segment_anything": Entry(segment_anything, frozenset({"qk"}), needs="segment_anything", same=True),
}


def made(name: str) -> nn.Module:
    """A family's model, all of its weights alive."""
    torch.manual_seed(0)
    model, generator = ZOO[name].make().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * min(0.3, 1.5 * max(parameter[0].numel(), 1) ** -0.5))
    return model


def images_for(name: str, count: int = 3) -> Tensor:
    side = ZOO[name].side
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))
