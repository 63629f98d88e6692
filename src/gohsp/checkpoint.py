"""Model folders: ``config.json`` for people, ``model.safetensors`` for weights, and no pickle."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gohsp import models
from gohsp.errors import CheckpointError, DataError, PlanError, UnsupportedModelError, one_line, require_packages
from gohsp.files import save_tensors, write_atomic
from gohsp.models.libraries.processor import ImageProcessor
from gohsp.structure import (
    Kept,
    Network,
    SublayerWidths,
    check_widths,
    count_macs,
    count_params,
    kept_to_json,
    widths_from_json,
    widths_to_json,
)

FORMAT_VERSION = 2
"""What is written. Version 1 is read: it gave widths block by block, since all models were timm's."""

MAX_CONFIG_BYTES = 6 * 2**20
"""The kept indices of the largest models take about 4 MiB."""

MAX_CONFIG_TABLES = 65_536
"""Lists and tables in a config: some 3 for each head."""

MAX_HEADER_BYTES = 4 * 2**20
"""The header of a thousand tensors takes about 0.1 MiB."""

MAX_WIDTH = 2**20
FLOATING = ("F64", "F32", "F16", "BF16")
"""Types that the tensors of a library's model may have, in safetensors' words."""

COUNTING = ("I64", "I32", "BOOL")
"""Further types in a module of the user's own: BatchNorm counts batches."""

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
FILES = [CONFIG, WEIGHTS, PROCESSOR]
"""A model folder; the last is there for models of transformers alone."""

Token = str | bool | None
"""Of the Hugging Face hub, as its client takes it."""


class _Level(BaseModel):
    """One table of ``config.json``: exact types, finite numbers, no key that is not declared."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="forbid")


class Preprocessing(_Level):
    """What evaluation does with an image, in the words of timm's ``pretrained_cfg``; what is left out is timm's.

    ``image_size`` is there where a model takes any, and its image processor names one.
    """

    mean: list[float] | None = Field(default=None, min_length=1, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1, max_length=3)
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    image_size: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=2, max_length=2)] | None = None


Width = Annotated[int, Field(ge=0, le=MAX_WIDTH)]
Name = Annotated[str, Field(max_length=512)]


class ModelConfig(_Level):
    """What ``config.json`` holds: all that is needed to make the model again, and how it came to be.

    Attributes:
        format_version: Of this table.
        library: Whose model it is; None for a module of the user's own, which takes such a module to load.
        architecture: Its plain name there.
        arguments: What differs from that name's defaults (:mod:`gohsp.models.libraries.arguments`).
        preprocessing: For evaluation.
        at: Name of the module whose sub-layers these are, since more of the model cannot be described; else empty.
        widths: Of every sub-layer, by name.
        class_names: In the order of the classifier's outputs; None where they are not known.
        kept: Units of the dense original that stayed, for the record.
        params: For the record.
        macs: For the record; of one image.
        made_by: For the record.
        metrics: For the record.
    """

    format_version: Literal[2]
    library: Annotated[str, Field(max_length=64)] | None
    architecture: Annotated[str, Field(pattern=r"^\w{1,128}$")] | None
    arguments: dict[str, JsonValue]
    preprocessing: Preprocessing
    at: Name = ""
    widths: dict[Name, dict[Literal["heads", "qk", "vo", "units"], Width]] = Field(max_length=1024)
    class_names: list[str] | None = None
    kept: dict[str, JsonValue] | None = None
    params: int | None = None
    macs: int | None = None
    made_by: dict[str, JsonValue] = {}
    metrics: dict[str, JsonValue] = {}

    @property
    def specification(self) -> dict[str, Any]:
        """What a library makes the dense model by."""
        return {"library": self.library, "architecture": self.architecture, "arguments": self.arguments}

    @model_validator(mode="after")
    def _a_library_names_its_architecture(self) -> Self:
        if (self.library is None) != (self.architecture is None):
            raise ValueError("library and architecture must both be there, or be null for a module of one's own")
        return self


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    own: bool = False,
    at: str = "",
    images: models.Example | None = None,
    kept: Kept | None = None,
    made_by: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, dense or pruned, to a folder that :func:`load` reads in one line.

    Args:
        model: A model that can be pruned. One of timm's is made again on loading; of any other, the folder holds widths
            and weights, and ``load(folder, into=module)`` puts them into a module of the same code.
        folder: Where to; made if missing. Its model files are replaced.
        own: Whether to take a timm model, too, for a module of the user's own.
        at: Name of the module that was pruned, where blocks elsewhere in the model are such as cannot be.
        images: An image that the model takes, or a mapping with one and what it takes besides, as of
            :func:`gohsp.describe`; None for noise of the size that it seems to take.
        kept: Which units of the dense original it kept, for the record.
        made_by: How it was made (versions, budget, settings), for the record.
        metrics: Its measured figures, for the record.

    Raises:
        UnsupportedModelError: The model cannot be described, or what would be loaded computes something else.
        NonFiniteError: A weight is NaN or infinite.
        CheckpointError: Its preprocessing is none that gohsp knows.
        StorageError: The folder cannot be written.
    """
    folder, model = Path(folder), models.unwrapped(model)
    network = models.describe(model, images, at)
    models.check_finite(model)
    own = own or not models.is_library_model(model)
    specification = models.OWN if own else models.require_remakeable(model, at)
    config = {
        "format_version": FORMAT_VERSION,
        **specification,
        "preprocessing": _preprocessing_of(model),
        **({"at": at} if at else {}),  # which earlier versions would not read
        "widths": widths_to_json(network.widths),
        "class_names": models.class_names(model),
        "kept": kept_to_json(kept) if kept else None,
        "params": count_params(network),
        "macs": count_macs(network),
        "made_by": dict(made_by or {}),
        "metrics": dict(metrics or {}),
    }
    text, processor = _as_text(config), _processor_text(model, folder / PROCESSOR)
    _checked(_decoded(text, folder / CONFIG), folder / CONFIG)  # what is written can be read
    # Weights first: a folder whose config is the new one always has the new weights too.
    save_tensors(folder / WEIGHTS, model.state_dict() if own else models.stored(model))
    if processor is None:
        (folder / PROCESSOR).unlink(missing_ok=True)  # of a model that stood there before
    else:
        write_atomic(folder / PROCESSOR, processor)
    write_atomic(folder / CONFIG, text)


def _processor_text(model: nn.Module, path: Path) -> str | None:
    """What transformers does with an image for this model, for its users; gohsp keeps its own record."""
    known = models.pretrained_cfg(model).get("image_processor")
    return None if known is None else _as_text(_processor_in(known, path).model_dump(exclude_none=True))


def _as_text(config: Mapping[str, Any]) -> str:
    """JSON with an entry a line, and of tables of tables a table a line: kept indices by the thousand stay readable."""

    def shown(value: Any) -> str:
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            rows = ",\n    ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            return f"{{\n    {rows}\n  }}"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {shown(value)}" for key, value in config.items()) + "\n}\n"


def _preprocessing_of(model: nn.Module) -> dict[str, Any]:
    known = models.pretrained_cfg(model)
    return {key: known[key] for key in Preprocessing.model_fields if known.get(key) is not None}


def preprocessing_in(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a configuration of somebody else's says of preprocessing, checked; everything else in it is left out.

    Raises:
        CheckpointError: A value that is not allowed.
    """
    known = {key: content[key] for key in Preprocessing.model_fields if content.get(key) is not None}
    try:
        return Preprocessing.model_validate(known).model_dump(exclude_none=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_problem(error)}") from error


def read_processor(folder: Path) -> ImageProcessor | None:
    """What the image processor of a folder of transformers does, or None where there is none.

    Raises:
        CheckpointError: It is damaged, or a value is not allowed.
    """
    path = folder / PROCESSOR
    return _processor_in(read_json(path), path) if path.exists() else None


def _processor_in(content: Any, path: Path) -> ImageProcessor:
    try:
        return ImageProcessor.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"'{path}': {_problem(error)}; give what an image processor saves") from error


def read_config(folder: Path) -> ModelConfig:
    """Read and check ``config.json``.

    Raises:
        CheckpointError: It is missing, damaged, of a newer format version, or holds anything that :func:`save` does
            not write.
    """
    path = folder / CONFIG
    return _checked(read_json(path), path)


def read_json(path: Path) -> Any:
    """The content of a JSON file of limited size.

    Raises:
        CheckpointError: It is missing, too large, or no JSON.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES or not path.is_file():
            raise CheckpointError(
                f"'{path}' is no file of at most {MAX_CONFIG_BYTES} bytes; it was not written by gohsp"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.parent}' holds no {path.name}; give a folder that gohsp wrote") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}); it is damaged") from error
    return _decoded(text, path)


def _decoded(text: str, path: Path) -> Any:
    if text.count("[") + text.count("{") > MAX_CONFIG_TABLES:
        raise CheckpointError(f"'{path}' holds more than {MAX_CONFIG_TABLES} lists and tables; gohsp writes fewer")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}); it is damaged or truncated") from error


def _checked(content: Any, path: Path) -> ModelConfig:
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"'{path}' has no format_version; it was not written by gohsp")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' is of format version {_shown(version)}, this gohsp reads up to {FORMAT_VERSION}; update gohsp"
        )
    if version == 1:
        content = _from_version_1(content)
    try:
        config = ModelConfig.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"'{path}': {_problem(error)}; it is damaged, or gohsp did not write it") from error
    if config.library is not None:
        models.check_specification(config.specification, f"'{path}'")
    return config


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """A table of the first edition, which knew timm's models alone, as one of this; what is wrong in it stays so."""
    widths = content.get("widths")
    if isinstance(widths, list) and all(isinstance(block, dict) for block in widths):
        named: dict[str, Any] = {}
        for i, block in enumerate(widths):
            named[f"blocks.{i}.attn"] = {key: value for key, value in block.items() if key != "ffn"}
            named[f"blocks.{i}.mlp"] = {"units": block["ffn"]} if "ffn" in block else {}
        content = {**content, "widths": named}
    return {**content, "format_version": 2, "kept": None}


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "missing":
        return f"'{place}' is missing"
    if first["type"] == "extra_forbidden":
        return f"'{place}' is unknown"
    if not place:  # something that several entries have to be together
        return first["msg"].removeprefix("Value error, ")
    return f"'{place}' is {_shown(first['input'])}: {first['msg']}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or a nest
        return "something that cannot be shown"
    return text if len(text) <= 80 else f"{text[:77]}..."


def load(
    folder_or_hub_id: str | Path,
    *,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: Token = None,
) -> nn.Module:
    """Load a model that gohsp wrote: one line, strict, without unpickling anything.

    Nothing in the folder can name a file, an address or code: the config holds what :func:`save` writes and nothing
    else, and it is checked against the header of the weights before anything is allocated.

    Args:
        folder_or_hub_id: A local folder, or the id of a Hugging Face hub repository with the same files.
        into: A dense module of the code that the pruned one was made of. It is cut to the folder's widths and gets its
            weights, in place, once all has been checked. A model of timm's needs none.
        device: Where to put the model; None is the CPU, or where ``into`` is.
        revision: Branch, tag or hash of a commit of the hub's repository; None is its main branch.
        token: For a private repository of the hub; None is that of ``hf auth login`` or ``HF_TOKEN``, if any, and False
            none at all.

    Returns:
        The model in evaluation mode. Its attention modules are the library's own wherever widths allow.

    Raises:
        CheckpointError: No such folder, repository or revision; a revision of a local folder; a damaged, truncated or
            newer folder; config and tensors that disagree (the first mismatches are listed); a folder that takes
            ``into`` without it.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedModelError: ``into`` cannot be described.
    """
    folder = local_folder(folder_or_hub_id, revision=revision, token=token)
    into = None if into is None else models.unwrapped(into)
    config, weights = read_config(folder), folder / WEIGHTS
    widths = _widths_in(config, folder / CONFIG)
    own = config.library is None or into is not None
    header = read_header(weights, (*FLOATING, *COUNTING) if own else None)
    if into is None:
        model = _made(config, widths, header, folder)
    else:
        model = _cut_down(into, config.at, widths, folder)
        device = next(into.parameters()).device if device is None else device
    expected = model.state_dict() if config.library is None else models.stored(model)
    if problems := models.fit_problems(expected, header):
        raise CheckpointError(f"'{weights}' does not fit the model: {models.listed(problems)}")
    tensors = read_tensors(weights, device or "cpu")
    model.load_state_dict(tensors, strict=config.library is None, assign=into is None)
    if into is None:
        models.fill_buffers(model, config.specification, widths)
    models.check_finite(model)
    if into is not None:
        models.resize(into, widths)
        into.load_state_dict(model.state_dict(), strict=True)
        model = into.to(device)
    _restore_labels(model, config, folder)
    return model.eval()


def apply(
    model: nn.Module, folder_or_hub_id: str | Path, *, revision: str | None = None, token: Token = None
) -> nn.Module:
    """A copy of a dense module of the user's own, cut and with the weights that a folder holds; see :func:`load`."""
    return load(folder_or_hub_id, into=copy.deepcopy(model), revision=revision, token=token)


def outline(folder: Path) -> nn.Module | None:
    """A folder's model without its weights, on the meta device; None of a module of the user's own.

    Raises:
        CheckpointError: What :func:`read_config` refuses, or widths that do not fit the architecture.
    """
    config = read_config(folder)
    if config.library is None:
        return None
    model = _resized(config, _widths_in(config, folder / CONFIG), folder)
    _restore_labels(model, config, folder)
    return model


def _widths_in(config: ModelConfig, path: Path) -> dict[str, SublayerWidths]:
    try:
        return widths_from_json(config.widths)
    except PlanError as error:
        raise CheckpointError(f"'{path}': widths: {error}") from error


def _made(
    config: ModelConfig, widths: Mapping[str, SublayerWidths], header: Mapping[str, TensorInfo], folder: Path
) -> nn.Module:
    """The model on the meta device, made by its library."""
    if config.library is None:
        raise CheckpointError(
            f"'{folder}' holds a module of somebody's own, which no library makes; give one: "
            "gohsp.load(folder, into=module)"
        )
    _require_blocks(config, header, folder / WEIGHTS)
    return _resized(config, widths, folder)


def _resized(config: ModelConfig, widths: Mapping[str, SublayerWidths], folder: Path) -> nn.Module:
    try:
        model = models.build(config.specification)
        _require_sublayers(models.describe(model, at=config.at), widths)
        models.resize(model, widths)
        models.describe(model, at=config.at)
    except (ValueError, KeyError, UnsupportedModelError, PlanError) as error:
        raise CheckpointError(f"'{folder / CONFIG}': widths do not fit the architecture: {error}") from error
    return model


def _require_sublayers(network: Network, widths: Mapping[str, SublayerWidths]) -> None:
    """Check that there are widths of the architecture's sub-layers, of the right type, and of nothing else."""
    for name in {**network.widths, **widths}:
        needed, given = network.widths.get(name), widths.get(name)
        if type(needed) is not type(given):
            raise PlanError(f"'{name}' has {type(given).__name__}, the architecture {type(needed).__name__}")


def _cut_down(into: nn.Module, at: str, widths: Mapping[str, SublayerWidths], folder: Path) -> nn.Module:
    """A copy of a module, cut to other widths; its blocks that the folder does not name never ran."""
    try:
        network = models.described_still(into, at)
        check_widths(network, {**network.widths, **widths})
    except PlanError as error:
        raise CheckpointError(f"the widths in '{folder / CONFIG}' do not fit the module: {error}") from error
    return models.resized(into, widths)


def _restore_labels(model: nn.Module, config: ModelConfig, folder: Path) -> None:
    """What evaluation does with an image, and the names of classes, where the model has a place for them."""
    known = config.preprocessing.model_dump(exclude_none=True)
    if processor := read_processor(folder):
        known["image_processor"] = processor.model_dump(exclude_none=True)
    if config.library is None or (config.library != "timm" and not known and config.class_names is None):
        return
    before = models.pretrained_cfg(model)
    model.pretrained_cfg = {**before, **known, "label_names": None}  # type: ignore[assignment]
    try:
        models.set_class_names(model, config.class_names)
    except DataError as error:
        raise CheckpointError(f"'{folder / CONFIG}': class_names: {error}") from error


def _block_of(sublayer: str) -> str:
    """The block that holds a sub-layer: its name up to its number, or without its last part where none has one."""
    parts = sublayer.split(".")
    numbered = [place for place, part in enumerate(parts[:-1], 1) if part.isdecimal()]
    return ".".join(parts[: numbered[-1] if numbered else -1])


def _require_blocks(config: ModelConfig, header: Mapping[str, TensorInfo], weights: Path) -> None:
    """The same blocks in the tensors as in the config, so that an architecture is not deeper than its weights."""
    given = {_block_of(name) for name in config.widths}
    containers = tuple({f"{name.rpartition('.')[0]}." for name in given})
    stored = {
        f"{container}{name.removeprefix(container).partition('.')[0]}"
        for name in header
        for container in containers
        if name.startswith(container)
    }
    depth = config.arguments.get("depth", len(given))
    if not depth == len(given) == len(stored):
        raise CheckpointError(
            f"'{weights}' holds {len(stored)} blocks, its {CONFIG} says depth {depth} and has widths of {len(given)}"
        )


def local_folder(
    folder_or_hub_id: str | Path,
    files: Sequence[str] = FILES,
    *,
    revision: str | None = None,
    token: Token = None,
) -> Path:
    """A local folder as it is, or one of the hub's cache, to which a repository's files are fetched.

    Raises:
        CheckpointError: It is neither, or a local folder with a revision.
        MissingPackageError: It is no folder, and the hub's client is not installed.
    """
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"'{folder}' is a local folder, which has no revision {revision!r}; leave it out")
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"'{folder}' is a file, where a folder of gohsp.save or of a run is loaded; of a file of weights make a "
            "model by gohsp.open_model(name, weights=...)"
        )
    if not re.fullmatch(r"[^/\\]+/[^/\\]+", str(folder_or_hub_id)):
        raise CheckpointError(f"there is no folder '{folder_or_hub_id}', and names on the hub have the form OWNER/NAME")
    require_packages(f"'{folder}', which is no folder,", "hub", "huggingface_hub")
    from huggingface_hub import snapshot_download  # models of local folders need none

    try:
        return Path(
            snapshot_download(str(folder_or_hub_id), revision=revision, token=token, allow_patterns=list(files))
        )
    except Exception as error:  # errors of the hub's client and its HTTP library have no base class in common
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"'{folder_or_hub_id}' is neither a local folder nor a hub repository that can be reached{at}: "
            f"{one_line(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: its shape and data type, without its values."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path, allowed: Sequence[str] | None = None) -> dict[str, TensorInfo]:
    """Names, shapes and types of the tensors in a safetensors file; no tensor is read.

    Args:
        path: The file.
        allowed: Types that its tensors may have; None for one of :data:`FLOATING`, the same for all.

    Raises:
        CheckpointError: No such file, no safetensors, a header of more than a few megabytes, or tensors that are not
            all of types that are allowed.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"'{path}' is missing, or no file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"'{path}' has a header of {length} bytes; it is damaged or no safetensors")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            header = {n: TensorInfo(tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
    except (SafetensorError, OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no room to map it
        raise CheckpointError(
            f"'{path}' cannot be read ({error}); it is damaged, truncated or no safetensors"
        ) from error
    types = sorted({info.dtype for info in header.values()})
    if (allowed is None and len(types) > 1) or not set(types) <= set(allowed or FLOATING):
        raise CheckpointError(f"'{path}' holds tensors of {types}; a model's are all of one of {list(FLOATING)}")
    return header


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: No such file, or no safetensors.
    """
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error}); it is damaged, truncated or no safetensors"
        ) from error
