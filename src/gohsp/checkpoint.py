"""Model folders: ``config.json`` for people, ``model.safetensors`` for weights, and no pickle (design, section 7)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gohsp import models
from gohsp.errors import CheckpointError, PlanError
from gohsp.structure import Plan, model_cost, shapes_from_json, shapes_to_json

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that no half-written file ever stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors are moved to the CPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    os.replace(temporary, path)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    made_by: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, dense or pruned, to a folder that :func:`load` reads in one line.

    Args:
        model: A supported model.
        folder: Where to; made if missing. Its model files are replaced.
        plan: Which units of the dense original it kept, for the record.
        made_by: How it was made (versions, budget, recipe), for the record.
        metrics: Its measured figures, for the record.

    Raises:
        UnsupportedModelError: The model cannot be described.
        NonFiniteError: A weight is NaN or infinite.
        CheckpointError: The architecture could not be made again from what would be written.
    """
    folder = Path(folder)
    models.check_finite(model)
    structure = models.describe(model)
    specification = models.specification(model)
    state = model.state_dict()
    _check_fit(models.build(specification, structure.shapes).state_dict(), state, "the model to be saved")
    pretrained = getattr(model, "pretrained_cfg", {}) or {}
    config = {
        "format_version": FORMAT_VERSION,
        **specification,
        "preprocessing": {key: pretrained[key] for key in _PREPROCESSING if key in pretrained},
        "widths": shapes_to_json(structure.shapes),
        "kept": plan.to_json() if plan else None,
        "params": model_cost(structure, structure.shapes, "params"),
        "macs": model_cost(structure, structure.shapes, "macs"),
        "made_by": dict(made_by or {}),
        "metrics": dict(metrics or {}),
    }
    text = json.dumps(config, indent=2) + "\n"
    # Weights first: a folder whose config is the new one always has the new weights too.
    save_tensors(folder / WEIGHTS, state)
    write_atomic(folder / CONFIG, text)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json``.

    Raises:
        CheckpointError: It is missing, damaged, lacks entries, or is of a newer format version.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' holds no {CONFIG}; give a folder that gohsp wrote") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}); it is damaged or truncated") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"'{path}' has no format_version; it was not written by gohsp")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' is of format version {version}, this gohsp reads up to {FORMAT_VERSION}; update gohsp"
        )
    missing = [k for k in ("library", "architecture", "arguments", "preprocessing", "widths") if k not in config]
    if missing:
        raise CheckpointError(f"'{path}' lacks {missing}; it is damaged")
    return config


def load(folder_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model that gohsp wrote: one line, strict, without unpickling anything.

    Args:
        folder_or_hub_id: A local folder, or the id of a Hugging Face hub repository with the same files.
        device: Where to put the model.

    Returns:
        The model in evaluation mode. Its attention modules are the library's own wherever widths allow.

    Raises:
        CheckpointError: No such folder or repository; a damaged, truncated or newer folder; config and tensors
            that disagree (the first mismatches are listed).
    """
    folder = _local_folder(folder_or_hub_id)
    config = read_config(folder)
    try:
        shapes = shapes_from_json(config["widths"])
    except PlanError as error:
        raise CheckpointError(f"'{folder / CONFIG}': {error}") from error
    try:
        model = models.build(config, shapes)
    except ValueError as error:
        raise CheckpointError(f"'{folder / CONFIG}': widths do not fit the architecture: {error}") from error
    state = _read_tensors(folder / WEIGHTS, device)
    _check_fit(model.state_dict(), state, f"'{folder / WEIGHTS}'")
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise CheckpointError(f"buffers {left[:3]} of '{config['architecture']}' are not stored in its weights")
    if getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = {**model.pretrained_cfg, **config["preprocessing"]}  # type: ignore[dict-item]
    return model.eval()


def is_model_folder(path: str | Path) -> bool:
    """Whether ``path`` is a local folder with a ``config.json``."""
    return (Path(path) / CONFIG).is_file()


def _local_folder(folder_or_hub_id: str | Path) -> Path:
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(folder_or_hub_id), allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"'{folder_or_hub_id}' is neither a local folder nor a hub repository that can be reached: {error}"
        ) from error


def _read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error}); it is damaged, truncated or no safetensors"
        ) from error


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes; list the first mismatches."""
    problems = [f"'{k}' is missing" for k in expected if k not in given]
    problems += [f"'{k}' is not part of the model" for k in given if k not in expected]
    problems += [
        f"'{k}' is {list(given[k].shape)}, the model has {list(expected[k].shape)}"
        for k in expected
        if k in given and given[k].shape != expected[k].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{what} does not fit the model: " + "; ".join(problems[:5]) + more)
