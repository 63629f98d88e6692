"""lucidrains' ``vit_pytorch``: pairs in a list, whose norms stand in them and whose outputs their caller adds.

Each file of that library has classes of its own, which mostly are copies. Those stand here that keep plain attention.
"""

from __future__ import annotations

from gohsp.models.attention import AttentionLayout, maps_at
from gohsp.models.families.layout import Branch, FfnLayout, Known, Layout

PACKED = [("to_qkv.weight", "to_qkv.bias")] * 3
NATIVE = {"heads": "heads", "scale": "scale"}

DROPPING = AttentionLayout(
    maps=maps_at(PACKED, "to_out.0"),
    heads="heads",
    norm="norm",
    keeps=("to_out.1",),
    dropout="dropout",
    readout_dropout="to_out.1",
    native=NATIVE,
)
SIMPLE = AttentionLayout(maps=maps_at(PACKED, "to_out"), heads="heads", norm="norm", dropout=None, native=NATIVE)

PAIR = Layout(attention=Branch(module="0"), ffn=Branch(module="1"), apart=True)

FILES = {
    "vit": DROPPING,
    "vit_with_patch_dropout": DROPPING,
    "simple_vit": SIMPLE,
    "simple_vit_with_patch_dropout": SIMPLE,
    "simple_vit_with_register_tokens": SIMPLE,
}
"""Modules of the library, and the attention that they have."""

ATTENTIONS = {f"vit_pytorch.{file}.Attention": (attention,) for file, attention in FILES.items()}
FFNS = {
    f"vit_pytorch.{file}.FeedForward": (
        FfnLayout(inputs=("net.1",), readout="net.4"),  # with dropout between
        FfnLayout(inputs=("net.1",), readout="net.3"),
    )
    for file in FILES
}

KNOWN = Known(
    blocks={(f"vit_pytorch.{file}.Attention", f"vit_pytorch.{file}.FeedForward"): (PAIR,) for file in FILES},
    attentions=ATTENTIONS,
    ffns=FFNS,
)
