"""Which models enter: every name of timm, and every vision model of transformers by its default configuration.

    python benchmarks/families.py
    python benchmarks/families.py --like        # timm's ViT-like names alone

Models are made on the meta device, without weights, and described. One that is refused says why; anything else than a
refusal is a crash, of which there must be none. ViT-like are ``*vit_*patch*``, ``deit*``, ``eva*``, ``beit*`` and
``swin_*``.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import gohsp
from gohsp import GohspError
from shared import RESULTS, parser, say, versions, write_results

LIKE = ("*vit_*patch*", "deit*", "eva*", "beit*", "swin_*")
MAPPINGS = ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING")
TOWERS = (
    "CLIPVisionModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "IJepaModel",
    "SiglipVisionModel",
)
"""Vision models of transformers without a head, by which the mappings do not name them."""


def is_like(name: str) -> bool:
    """Whether a name of timm's is ViT-like."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in LIKE)


def of_timm(like: bool) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What makes each of the names that timm knows."""
    for name in timm.list_models():
        if not like or is_like(name):
            yield name, lambda name=name: timm.create_model(name)


def of_transformers() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Vision models of transformers and what makes them by default."""
    library: Any = importlib.import_module("transformers")
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    classes = {name: getattr(library, name) for name in TOWERS if hasattr(library, name)}
    for mapping in MAPPINGS:
        for found in getattr(auto, mapping).values():
            for cls in found if isinstance(found, tuple) else (found,):
                classes[cls.__name__] = cls
    for name, cls in sorted(classes.items()):
        yield name, lambda cls=cls: cls(cls.config_class())


def verdict(make: Callable[[], nn.Module]) -> tuple[str, str]:
    """``accepted``, ``refused``, ``not made`` or ``crashed``, and what there is to say of it."""
    try:
        with torch.device("meta"):
            model = make().eval()
    except Exception as error:  # libraries fail in ways of their own
        return "not made", f"{type(error).__name__}: {error}"[:200]
    try:
        network = gohsp.describe(model)
    except GohspError as error:
        return "refused", re.sub(r"; supported: .*", "", str(error))[:200]
    except Exception as error:  # that none happens is the question
        return "crashed", f"{type(error).__name__}: {error}"[:200]
    kinds = sorted({kind for sub in network.present for kind in sub.prunable})
    return "accepted", ", ".join(kinds)


def sweep(models: Iterator[tuple[str, Callable[[], nn.Module]]]) -> dict[str, list[str]]:
    """The verdict on each."""
    found = {}
    for name, make in models:
        found[name] = list(verdict(make))
        if found[name][0] == "crashed":
            say(f"{name}: {found[name]}")
    return found


def main() -> None:
    """Sweep, and write what was found."""
    arguments = parser(__doc__)
    arguments.add_argument("--like", action=argparse.BooleanOptionalAction, default=False)
    arguments.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    arguments.add_argument("--results", type=Path, default=RESULTS / "families.json")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    found = {"timm": sweep(of_timm(options.like))}
    if options.transformers:
        found["transformers"] = sweep(of_transformers())
    like = Counter(said for name, (said, _) in found["timm"].items() if is_like(name))
    counts = {library: Counter(said for said, _ in of.values()) for library, of in found.items()}
    write_results(
        options.results,
        {
            "versions": versions(*(["transformers"] if options.transformers else [])),
            "counts": {**counts, "timm's ViT-like names": like},
            "models": found,
        },
    )
    for name, of in {**counts, "timm's ViT-like names": like}.items():
        say(f"{name}: {dict(of)}")


if __name__ == "__main__":
    main()
