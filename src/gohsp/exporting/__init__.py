"""A model as a file for another runtime, and the check at once that it computes the same.

Data flows one way: a module becomes a program of ``torch.export``, a target makes of that what its runtime reads, and
the file is read back and run beside the module. A target is a module of this package, which says

- ``SUFFIX`` of its file, ``BESIDE``: suffixes of what may lie beside that, ``NEEDS``: packages of its extra;
- ``TYPES`` of weights that its runtime computes with, that ``RUNTIME`` in words, and whether attention is one operator
  there (``FUSED``);
- ``converted``, ``how``, ``save`` and ``opened``: from the program to the file, and back to a function of images.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gohsp import files, models
from gohsp.core.objective import tensor_in
from gohsp.data import Preprocessing
from gohsp.errors import (
    ConfigError,
    DataError,
    ExportError,
    StorageError,
    UnsupportedModelError,
    nearest,
    one_line,
    require_packages,
)
from gohsp.exporting import onnx, openvino, program, traced
from gohsp.settings import POSITIVE, require

Target = Literal["onnx", "torch", "openvino"]
TARGETS: dict[str, ModuleType] = {"onnx": onnx, "torch": program, "openvino": openvino}

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of a file and its model by type of weights, relative to the output's scale.

Another runtime sums in another order, so that of some tens of roundings is allowed.
"""

BATCHES = (1, 3)
"""Images that a file is checked with; the program is traced with two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """The input or output of a file.

    Attributes:
        name: What the runtime calls it.
        shape: ``batch`` where it is of any size.
        dtype: Its type, in PyTorch's words.
    """

    name: str
    shape: tuple[int | Literal["batch"], ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How a file was compared with its model, on random images.

    Attributes:
        runtime: What ran the file.
        batches: Numbers of images.
        absolute: The largest difference of outputs.
        relative: The same over the largest magnitude of the model's output.
        tolerance: What the latter may be.
    """

    runtime: str
    batches: tuple[int, ...]
    absolute: float
    relative: float
    tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written; the JSON beside the file holds the same.

    Attributes:
        path: The file to open; in the JSON its name alone.
        target: ``onnx``, ``torch`` or ``openvino``.
        how: What made it.
        model: The model's class.
        params: The model's parameters.
        input: Images, preprocessed.
        output: What counts of the model's output.
        returned: The class of what the model returns.
        part: Which part of that ``output`` is: a field, a place in a tuple; None if it is all of it.
        preprocessing: What becomes of an image, in timm's words, ``mean`` and ``std`` being of pixels of 0 to 1; None
            where the model does not say it.
        class_names: In the order of the outputs; None where they are not known.
        check: The comparison with the model.
        versions: Of the packages that made and ran it.
    """

    path: Path
    target: str
    how: str
    model: str
    params: int
    input: Port
    output: Port
    returned: str
    part: str | None
    preprocessing: dict[str, Any] | None
    class_names: tuple[str, ...] | None
    check: Check
    versions: dict[str, str]


def export(
    model: nn.Module,
    path: str | Path,
    to: Target = "onnx",
    *,
    images: Tensor | None = None,
    output: Callable[[Any], Tensor] = tensor_in,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model, dense or pruned, as a file for another runtime, which takes any number of images.

    The file is run beside the model before it takes its place: a file that computes something else is never left. A
    JSON of the file's name and ``.json`` says what it is (:class:`Exported`).

    Args:
        model: The model, on any device; left as it is. float16 and bfloat16 stay what they are, where the target's
            runtime has them.
        path: The file: ``.onnx``, ``.pt2`` (``torch``) or ``.xml`` (``openvino``).
        to: ``onnx`` (``gohsp[onnx]``), run by ONNX Runtime among others; ``torch``, a program of ``torch.export``;
            ``openvino`` (``gohsp[openvino]``).
        images: An image or more ``[B, C, H, W]``, of which the size alone counts; None for the size that the model
            seems to take.
        output: Takes what the model returns to the tensor that the file gives out; by default the tensor itself, the
            logits, pooled or last state of a model output, or the first of a tuple.
        tolerance: Largest difference from the model over the largest magnitude of its output; None for 1e-4 of a model
            in float32, 2e-2 in float16, 5e-2 in bfloat16.
        overwrite: Whether to replace an earlier export.

    Raises:
        MissingPackageError: A package of the target is not installed.
        ExportError: The model cannot be traced or converted; its weights are of a type that the target's runtime lacks;
            the file computes something else.
        UnsupportedModelError: The model cannot compute such images, or no tensor is found in what it returns.
        NonFiniteError: A weight or output is NaN or infinite.
        ConfigError: No such target, or a tolerance that is no number above 0.
        StorageError: The file exists, has another suffix, or cannot be written.
    """
    path, target = Path(path), require_target(path, to, overwrite=overwrite)
    dtype = _type_of(model, to)
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    require("tolerance", allowed, POSITIVE)
    names = _names(path, target)
    with files.together(path.parent, names) as folder:
        reference = traced.counted(model, output)
        size = models.input_size(model) if images is None else tuple(images.shape[-3:])
        probe = _noise(2, size, dtype)
        taken = traced.taken(reference, probe)
        converted = _converted(target, traced.trace(reference, probe, fused=target.FUSED), to)
        with files.storing(path):
            target.save(converted, folder / path.name)
        check = _checked(
            reference, folder / path.name, target, [_noise(count, size, dtype) for count in BATCHES], allowed
        )
        exported = Exported(
            path=path,
            target=to,
            how=target.how(converted),
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            params=sum(parameter.numel() for parameter in model.parameters()),
            input=_port(traced.INPUT, probe),
            output=_port(traced.OUTPUT, taken.value),
            returned=taken.returned,
            part=taken.part,
            preprocessing=_preprocessing(model, size),
            class_names=models.class_names(model),
            check=check,
            versions=_versions(model, target),
        )
        files.write_atomic(folder / names[-1], as_text(exported))
    return exported


def require_target(path: str | Path, to: str, *, overwrite: bool) -> ModuleType:
    """Check what an export is to be, before the work; returns the target.

    Raises:
        ConfigError: No such target.
        MissingPackageError: A package is not installed.
        StorageError: The file has another suffix, or it or one beside it exists and is not to be replaced.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} is no target; {nearest(str(to), get_args(Target))}")
    path, target = Path(path), TARGETS[to]
    if path.suffix != target.SUFFIX or path.is_dir():
        other = next(
            (f", or export to {name}" for name, of in TARGETS.items() if of.SUFFIX == path.suffix != target.SUFFIX), ""
        )
        raise StorageError(
            f"'{path}' cannot be the file of an export to {to}; name one that ends in {target.SUFFIX}{other}"
        )
    require_packages(f"an export to {to}", to, *target.NEEDS)
    there = [name for name in _names(path, target) if path.with_name(name).exists()]
    if there and not overwrite:
        raise StorageError(
            f"'{path.with_name(there[0])}' exists; name another file, or replace it with overwrite=True (--overwrite)"
        )
    return target


def _names(path: Path, target: ModuleType) -> list[str]:
    """All files that an export may write; the last says that the others are whole."""
    return [path.name, *(f"{path.stem}{suffix}" for suffix in target.BESIDE), f"{path.name}.json"]


def _type_of(model: object, to: str) -> torch.dtype:
    """The type that images are given in.

    Raises:
        UnsupportedModelError: It is no module.
        NonFiniteError: A weight is NaN or infinite.
        ExportError: A weight is of a type that the target's runtime lacks.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {type(model).__name__} cannot be exported; give a torch.nn.Module")
    models.check_finite(model)
    types = list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point())) or [torch.float32]
    if lacking := [name for name in types if name not in TARGETS[to].TYPES]:
        allowed = ", ".join(_word(name) for name in TARGETS[to].TYPES)
        raise ExportError(
            f"the model's weights are {_word(lacking[0])}, {TARGETS[to].RUNTIME} takes {allowed}; give "
            "copy.deepcopy(model).float(), or export to='torch'"
        )
    return types[0]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _noise(count: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count)).to(dtype)


def _converted(target: ModuleType, traced_program: torch.export.ExportedProgram, to: str) -> Any:
    try:
        return target.converted(traced_program)
    except Exception as error:  # converters have no class of errors in common
        raise ExportError(f"the model cannot be converted to {to}: {one_line(error)}") from error


@torch.no_grad()
def _checked(reference: nn.Module, file: Path, target: ModuleType, batches: list[Tensor], tolerance: float) -> Check:
    """Run a file beside its model.

    Raises:
        ExportError: The runtime cannot run it, or it computes something else.
    """
    absolute, scale = 0.0, 0.0
    try:
        run = target.opened(file)
        pairs = [(reference(images).double(), run(images).double()) for images in batches]
    except Exception as error:  # runtimes have no class of errors in common
        raise ExportError(f"{target.RUNTIME} cannot run the file: {one_line(error)}") from error
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ExportError(f"the file's output is {list(theirs.shape)}, the model's {list(ours.shape)}")
        absolute = max(absolute, float((ours - theirs).abs().nan_to_num(torch.inf).max()))
        scale = max(scale, float(ours.abs().max()))
    relative = absolute / max(scale, 1e-30)
    if not relative <= tolerance:
        raise ExportError(
            f"the file computes something else: it differs from the model by {relative:.1e} of the output's scale "
            f"({target.RUNTIME}; allowed {tolerance:.0e}), and was not kept. If the model magnifies roundings so much, "
            "allow more by tolerance= (--tolerance)"
        )
    return Check(
        runtime=target.RUNTIME,
        batches=tuple(len(images) for images in batches),
        absolute=absolute,
        relative=relative,
        tolerance=tolerance,
    )


def _port(name: str, example: Tensor) -> Port:
    return Port(name=name, shape=("batch", *example.shape[1:]), dtype=_word(example.dtype))


def _preprocessing(model: nn.Module, size: tuple[int, ...]) -> dict[str, Any] | None:
    """What becomes of an image, at the size of the input; None where the model does not say it."""
    with suppress(DataError):
        return {**dataclasses.asdict(Preprocessing.from_model(model)), "image_size": size[1:]}
    return None


def _versions(model: nn.Module, target: ModuleType) -> dict[str, str]:
    found = {}
    for name in ("gohsp", "torch", type(model).__module__.partition(".")[0], *target.NEEDS):
        with suppress(importlib.metadata.PackageNotFoundError):  # a user's own module is of no package
            found[name] = importlib.metadata.version(name)
    return found


def as_text(exported: Exported) -> str:
    """The JSON beside a file."""
    return json.dumps({**dataclasses.asdict(exported), "path": exported.path.name}, indent=2) + "\n"
