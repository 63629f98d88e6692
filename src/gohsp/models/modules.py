"""Names of modules' classes, and what stands in place of a sub-layer that was removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def class_name(module: object) -> str:
    """Full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def original_name(module: object) -> str:
    """The same, or of one of ours in a model the name of the class in whose place it stands."""
    return getattr(module, "stands_for", None) or class_name(module)


class Constant(nn.Module):
    """What is left of a sub-layer that was removed: one vector, which it adds to every token.

    A drop-in for an attention or an FFN; what it is given besides the stream it ignores. As a ``pair`` it stands for an
    attention that returns its weights, too. ``stands_for`` is the full name of the class that was there.
    """

    def __init__(
        self,
        dim: int,
        *,
        pair: bool = False,
        stands_for: str = "",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pair, self.stands_for = pair, stands_for
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, *args: Any, **given: Any) -> Any:
        """The vector for every token of the input ``[images, tokens, dim]``."""
        x = args[0] if args else given["hidden_states"]
        vector = self.bias.to(x.dtype).expand_as(x)
        return (vector, None) if self.pair else vector
