"""What makes a module's weights other than its own, and what to do about it before a cut."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from gohsp.errors import UnsupportedModelError
from gohsp.structure import is_in


def require_plain(model: nn.Module, blocks: Iterable[str], at: str = "") -> None:
    """Check that every module computes with parameters that are its own, by its class's own ``forward``.

    Args:
        model: The model.
        blocks: Names of the blocks that are to be cut; parameters that others share stay as they are.
        at: Name of the module that holds them; outside of it weights may be anything.

    Raises:
        UnsupportedModelError: Parametrised, masked, normalised or adapted weights, a parameter that several modules
            share, or a replaced ``forward``; the message names the module and what to do.
    """
    for name, module in model.named_modules():
        if problem := (_disguise(module) if is_in(name, at) else None) or _replaced(module):
            raise UnsupportedModelError(f"module '{name}' {problem}" if name else f"the model {problem}")
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name and any(is_in(shared, block) for shared in (owner, name) for block in blocks):
            raise UnsupportedModelError(
                f"'{name}' is the same parameter as '{owner}', and a cut of one would be a cut of both; give each "
                "module a copy of its own: torch.nn.Parameter(parameter.detach().clone())"
            )


def require_linear(name: str, module: nn.Module) -> None:
    """Check that a module that is to be cut is an ordinary linear map.

    Raises:
        UnsupportedModelError: Another class, or weights that are no ordinary floating-point tensor.
    """
    if type(module) not in (
        nn.Linear,
        NonDynamicallyQuantizableLinear,
    ):  # the latter is one to PyTorch's quantiser alone
        raise UnsupportedModelError(
            f"module '{name}' is a {type(module).__module__}.{type(module).__qualname__}; only a torch.nn.Linear can "
            "be cut. Prune first and quantise, adapt or replace modules afterwards"
        )
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"the weight of module '{name}' is a {type(weight).__qualname__} of {weight.dtype}; only ordinary "
            "floating-point parameters can be cut. Prune and save first, and quantise or shard what is loaded"
        )


def _disguise(module: nn.Module) -> str | None:
    """What is behind a module's weights in place of plain parameters, and how to make them plain; None if nothing."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    masked = [name for name, _ in module.named_buffers(recurse=False) if f"{name.removesuffix('_mask')}_orig" in own]
    if parametrize.is_parametrized(module):
        return (
            "is parametrised; put the weights that it computes in its place by "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    if masked:
        return f"is masked by torch.nn.utils.prune; make that final by prune.remove(module, '{masked[0][:-5]}')"
    if "weight_orig" in own:
        return "has a spectral norm; make its weights plain by torch.nn.utils.remove_spectral_norm(module)"
    if "weight_g" in own:
        return "has a weight norm; make its weights plain by torch.nn.utils.remove_weight_norm(module)"
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return "is an adapter (LoRA) around a module; merge it: model = peft_model.merge_and_unload()"
    return None


def _replaced(module: nn.Module) -> str | None:
    """What is wrong with a forward that is not the class's own, which a copy would call on the module it was set on."""
    # Accelerate leaves the class's own there when it unwraps a model altogether.
    if vars(module).get("forward") in (None, MethodType(type(module).forward, module)):
        return None
    return (
        "has a forward that was set on the instance; put its class's own back by del module.forward, or by "
        "accelerator.unwrap_model(model, keep_fp32_wrapper=False) for a model that Accelerate prepared"
    )
