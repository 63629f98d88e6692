"""How much each token's residual matters to the predictions: a label-free Fisher diagonal (beyond the design).

A least-squares repair that counts all tokens alike spends itself on tokens that the prediction hardly reads: in
the later blocks of a network with a class token nearly all of the gradient runs through that token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.activations import GRADIENT_IMAGES, evaluating, require_finite
from gohsp.structure import ModelStructure


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights ``[tokens]`` of mean 1 for what a block's two readouts write; None weighs all tokens alike."""

    attention: Tensor | None
    ffn: Tensor | None


def token_weights(
    model: nn.Module,
    structure: ModelStructure,
    batches: Sequence[Tensor],
    *,
    attention: float,
    ffn: float,
    seed: int = 0,
) -> tuple[TokenWeights, ...]:
    """Weigh tokens by the mean squared gradient of the predictions with respect to what is written to them.

    The gradient is that of the log-likelihood of classes drawn from the model's own predictions, so that its
    square estimates the Fisher information and no label is read.

    Args:
        model: A classifier; left as it is.
        structure: Its structure.
        batches: Calibration images ``[B, C, H, W]``; all of one size.
        attention: Share of the weight, in what attention writes, that follows the Fisher information, 0 to 1;
            the rest is spread evenly.
        ffn: The same in what FFNs write.
        seed: Of the drawn classes.

    Returns:
        Weights by block.

    Raises:
        NonFiniteError: The model's outputs are NaN or infinite.
    """
    if attention == ffn == 0:
        return (TokenWeights(None, None),) * len(structure.blocks)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    names = [r.module for b in structure.blocks for r in (b.attention_readout, b.ffn_readout)]
    totals = dict.fromkeys(names, torch.zeros((), dtype=torch.float64, device=device))
    with evaluating(model):
        for images in (few for batch in batches for few in batch.split(GRADIENT_IMAGES)):
            for name, gradient in zip(names, _gradients(model, names, images.to(device), generator), strict=True):
                totals[name] = totals[name] + gradient.double().square().sum((0, 2))
    return tuple(
        TokenWeights(
            _blended(totals[b.attention_readout.module], attention), _blended(totals[b.ffn_readout.module], ffn)
        )
        for b in structure.blocks
    )


def _gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Gradients ``[B, tokens, D]`` of one drawn class's log-likelihood, for the output of every named module."""
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A leaf is only needed where nothing before it asks for gradients; parameters may be frozen.
        output = output if output.requires_grad else output.detach().requires_grad_()
        outputs.append(output)
        return output

    with torch.enable_grad(), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        logits = model(images).float()
        require_finite("the model's output", logits)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), outputs)


def _blended(total: Tensor, share: float) -> Tensor | None:
    """Weights of mean 1; a readout that the predictions do not depend on weighs all tokens alike."""
    mean = total.mean()
    if share == 0 or mean <= 0:
        return None
    return (share * total / mean + (1 - share)).float()
