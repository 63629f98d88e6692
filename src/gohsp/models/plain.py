"""Models whose blocks are all alike, as their library makes them by its own settings: what loads without gohsp.

What settings can say is not written down class by class and version by version. A library's module says which settings
there are; a model is then made by them, without memory, and described.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gohsp.core import allocation
from gohsp.core.allocation import WidthSettings
from gohsp.errors import UnsupportedModelError
from gohsp.files import storing
from gohsp.models import families
from gohsp.models.description import blocks_of, describe
from gohsp.models.families import Reading, class_name
from gohsp.models.libraries import LIBRARIES, fit_problems, library, library_of, listed, output_problems
from gohsp.models.libraries.shape import shape_of
from gohsp.structure import FIELDS, KINDS, PARAMS, Absent, Ffn, Kind, Network, Sublayer, Widths

logger = logging.getLogger(__name__)

SAYABLE: tuple[frozenset[Kind], ...] = (
    frozenset({"head", "qk", "vo", "ffn"}),
    frozenset({"ffn"}),
    frozenset({"head", "qk", "vo"}),
)
"""Kinds that settings may be able to say, in the order in which they are tried."""


def sayable(model: nn.Module, network: Network, settings: WidthSettings) -> Network:
    """The network with everything held that settings of its library cannot say of all blocks alike; a warning names it.

    Args:
        model: A library's model, or a module with one inside that holds all blocks.
        network: Its description.
        settings: Allowed widths.

    Raises:
        UnsupportedModelError: No library's model holds all blocks, or its settings can say nothing of what may be cut.
    """
    name, part = _library_part(model, network)
    maker = library(str(library_of(part)))
    problems = []
    for kinds in SAYABLE:
        tried = replace(
            network, sublayers=tuple(_held(sub, kinds, maker.units_step(part)) for sub in network.sublayers)
        )
        least = allocation.smallest(tried, settings, uniform=True)
        if least == network.widths:
            continue
        problem = _problem(maker, name, part, network, least)
        if problem is None:
            _say_what_is_held(library_of(part), part, network, tried)
            return tried
        problems.append(problem)
    why = "; ".join(dict.fromkeys(problems)) or "no width is allowed in all blocks, but the present ones"
    raise UnsupportedModelError(
        f"uniform asks for what {library_of(part)}'s own settings can say, and they can say nothing of what may be cut "
        f"in this {class_name(part)}: {why}. Prune it without uniform"
    )


def _library_part(model: nn.Module, network: Network) -> tuple[str, nn.Module]:
    """Name and module of the outermost model of a library's that holds all blocks."""
    for name, module in model.named_modules():
        if library_of(module) is not None and all(
            block.startswith(f"{name}." if name else "") for block in network.blocks
        ):
            return name, module
    raise UnsupportedModelError(
        f"uniform asks for what settings of a model's library can say, and no model of {', '.join(LIBRARIES)} holds "
        f"all blocks of this {class_name(model)}; prune it without uniform, or give equal widths by widths="
    )


def _held(sub: Sublayer, kinds: frozenset[Kind], step: int | None) -> Sublayer:
    if isinstance(sub, Absent):
        return sub
    if isinstance(sub, Ffn):
        if step is None or step >= sub.widths.units:
            kinds = frozenset()
        else:
            sub = replace(sub, step=step)
    return replace(sub, prunable=sub.prunable & kinds, removable=False)


def _problem(maker: ModuleType, name: str, part: nn.Module, network: Network, widths: Widths) -> str | None:
    """What keeps settings from saying widths: nothing where the model that they make has these and is else the same."""
    prefix = f"{name}." if name else ""
    wanted = {sub.removeprefix(prefix): of for sub, of in widths.items()}
    try:
        with torch.device("meta"):
            made = maker.make_plain(part, maker.plain_settings(part, shape_of(network, widths)))
        found, outside = _made_of(made)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError, UnsupportedModelError) as error:
        return str(error)
    for sub, of in wanted.items():
        if found.get(sub) != of:
            return f"'{sub}' would have {found.get(sub)} in place of {of}"
    return None if outside == _made_of(part)[1] else "what is outside the blocks would change with them"


def _made_of(model: nn.Module) -> tuple[Widths, int]:
    """Widths of all sub-layers, and the parameters elsewhere; no image passes through, which takes memory."""
    reading = Reading(tokens=1, keys=1)  # of which widths and parameters know nothing
    subs = [
        sub
        for name, (block, family) in blocks_of(model).items()
        for sub in families.describe(family, name, block, reading)
    ]
    inside = sum(PARAMS.sublayer(sub, sub.widths) for sub in subs)
    return {sub.name: sub.widths for sub in subs}, sum(map(torch.Tensor.numel, model.parameters())) - inside


def _say_what_is_held(name: str | None, part: nn.Module, network: Network, tried: Network) -> None:
    before, after = ({kind for sub in of.present for kind in sub.prunable} for of in (network, tried))
    if held := [FIELDS[kind] for kind in KINDS if kind in before - after]:
        logger.warning(
            "uniform: %s's settings cannot say %s of a %s, which stay as they are",
            name,
            ", ".join(held),
            type(part).__name__,
        )


def plain(model: nn.Module) -> tuple[nn.Module, Any]:
    """A library's model made anew by the library's settings alone, with the same weights, and the settings.

    Raises:
        UnsupportedModelError: It is no library's model, or its settings cannot say its widths; the message names the
            tensors or outputs that would differ.
    """
    network, name = describe(model), library_of(model)
    if name is None:
        raise UnsupportedModelError(
            f"a {class_name(model)} is no model of {', '.join(LIBRARIES)}; give the model inside it that is"
        )
    maker, weight, state = library(name), next(model.parameters()), model.state_dict()
    try:
        settings = maker.plain_settings(model, shape_of(network, network.widths))
        with torch.random.fork_rng(devices=[]):  # new weights are drawn, and go again
            made = maker.make_plain(model, settings).to(weight.device, weight.dtype)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise UnsupportedModelError(f"{name} cannot make this model by settings alone: {error}") from error
    differences = fit_problems(made.state_dict(), state)
    if not differences:
        made.load_state_dict(state, strict=True)
        differences = output_problems(model, made)
    if differences:
        raise UnsupportedModelError(
            f"{name} cannot make this {class_name(model)} by settings alone: {listed(differences)}. They can say one "
            "width for all blocks, which gohsp.prune(..., uniform=True) leaves; gohsp.save keeps any widths"
        )
    return made.train(model.training), settings


def remade(model: nn.Module) -> nn.Module:
    """A uniform model with its library's own one, made by settings alone, in the place of what it was cut from."""
    name, part = _library_part(model, describe(model))
    made, _ = plain(part)
    if not name:
        return made
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, made)
    return model


def save_plain(model: nn.Module, folder: str | Path) -> None:
    """Write a library's model whose blocks are all alike in that library's layout, which it loads without gohsp.

    - timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``;
    - transformers: ``from_pretrained(FOLDER)`` of the model's class, or of ``AutoModel`` and its kin;
    - torchvision: ``config.json`` holds the constructor's ``arguments``, ``model.safetensors`` the state dict.

    Args:
        model: The model: dense, or pruned with ``uniform``.
        folder: Where to; made if missing. Its ``config.json`` and ``model.safetensors`` are replaced.

    Raises:
        UnsupportedModelError: The library's settings cannot say this model, or it is no library's.
        StorageError: The folder cannot be written.
    """
    made, settings = plain(model)
    with storing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        library(str(library_of(model))).save_plain(made, settings, Path(folder))
