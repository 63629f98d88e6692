"""Sharing a model on the Hugging Face hub: its card, and the upload. :func:`gohsp.load` takes it back."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from gohsp import checkpoint, models, report
from gohsp.checkpoint import FILES, PROCESSOR, WEIGHTS, ModelConfig, Token
from gohsp.errors import (
    CheckpointError,
    ConfigError,
    GohspError,
    StorageError,
    UnsupportedModelError,
    one_line,
    require_packages,
)
from gohsp.files import storing, write_atomic
from gohsp.report import quantity, relative, signed
from gohsp.structure import (
    Network,
    Widths,
    check_widths,
    count_macs,
    count_params,
    widths_from_json,
    widths_to_json,
)

CARD = "README.md"

_METRICS = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "loss": "cross entropy (nats)",
    "n": "images scored",
    "images": "images compared",
    "distance": "distance of the outputs from those before the cut",
    "predicted_distance": "distance foreseen",
    "agreement": "same first prediction as before the cut (%)",
}
"""What the metrics that gohsp writes are called for people; others keep their names."""

_FIELDS = {"heads": "heads", "qk": "q/k", "vo": "v/o", "units": "units"}

_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|&~$^:])")
"""Characters that mean something in Markdown, or make a link."""

_SHOWN = 200
"""Characters that are shown of a text in a file."""

_CITATION = """```bibtex
@inproceedings{yin2023gohsp,
  title     = {GOHSP: A Unified Framework of Graph and Optimization-based Heterogeneous Structured Pruning for
               Vision Transformer},
  author    = {Yin, Miao and Uzkent, Burak and Shen, Yilin and Jin, Hongxia and Yuan, Bo},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2023},
  note      = {arXiv:2301.05345},
}
```"""


def push_to_hub(
    model: nn.Module | str | Path,
    repository: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    dense: Network | None = None,
    card: str | None = None,
    private: bool | None = None,
    token: Token = None,
) -> str:
    """Upload a model with its card to the Hugging Face hub, whence ``gohsp.load(repository)`` loads it.

    The repository is made if it is not there. Its model files and its ``README.md`` are replaced, in one commit.

    Args:
        model: A model, or a folder that :func:`gohsp.save` or a run wrote, whose card tells the metrics, too. A model
            that its library cannot make again goes by its folder: ``gohsp.save(model, folder, own=True)``.
        repository: ``OWNER/NAME``.
        license: As of :func:`model_card`.
        base_model: As of :func:`model_card`.
        dense: As of :func:`model_card`.
        card: The text of ``README.md``; None for what :func:`model_card` makes.
        private: Whether a new repository is private; None is what its owner's settings say. A repository that is there
            must be as is asked for.
        token: That may write there; None is that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The commit's hash: ``gohsp.load(repository, revision=...)`` loads this very model whatever is pushed later.

    Raises:
        ConfigError: A repository, licence or base model that the hub does not take, a card as well as what to put into
            one, or a repository that is public and was to be private, or the other way round.
        CheckpointError: The folder holds no model of gohsp's.
        UnsupportedModelError: The model cannot be saved.
        StorageError: The hub does not take it, or cannot be reached.
        MissingPackageError: The hub's client is not installed.
    """
    _require_names(repository, license, base_model)
    if card is not None and not license is base_model is dense is None:
        raise ConfigError("a card is whole already; leave it out, or license, base_model and dense")
    with TemporaryDirectory() as temporary:
        staged = Path(temporary)
        if isinstance(model, nn.Module):
            source = staged
            checkpoint.save(model, staged)
        else:
            source = Path(model)
            _copy(source, staged)
        if card is None:
            card = model_card(source, repository, license=license, base_model=base_model, dense=dense)
        write_atomic(staged / CARD, card)
        return _uploaded(staged, repository, private, token)


def model_card(
    folder: str | Path,
    repository: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    dense: Network | None = None,
) -> str:
    """What the hub shows of a model: what was cut, its metrics, how to load it.

    Edit the text and hand it to :func:`push_to_hub` as ``card``.

    Args:
        folder: A folder that :func:`gohsp.save` or a run wrote. A run's report tells what the model was before.
        repository: ``OWNER/NAME``, where it is going to be.
        license: The hub's identifier of the licence, which is that of the base model if it asks for that, such as
            ``apache-2.0``; None leaves it open.
        base_model: The hub's ``OWNER/NAME`` of the model that was pruned, or None.
        dense: Description of the model before the cut, such as ``result.network``; None for that of a run's report, or
            for none.

    Returns:
        Markdown with YAML front matter.

    Raises:
        ConfigError: A repository, licence or base model that the hub does not take.
        CheckpointError: The folder holds no model of gohsp's, or a report of another one.
        PlanError: The model cannot have been cut from ``dense``.
        RunError: The report in the folder is damaged.
    """
    _require_names(repository, license, base_model)
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    config, outline = checkpoint.read_config(folder), checkpoint.outline(folder)
    front = ModelCardData(
        library_name="gohsp",
        license=license,
        base_model=base_model,
        pipeline_tag="image-classification" if outline is not None and _is_classifier(outline) else None,
        tags=["gohsp", "structured-pruning", "vision-transformer", *([config.library] if config.library else [])],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {repository.partition('/')[2]}",
        _introduction(config, license, base_model),
        *_cut(config, _before(config, folder, dense)),
        *_metrics(config),
        *_loading(config, outline, repository),
        f"## Citation\n\nThe pruning follows\n\n{_CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


# Checks


def _require_names(repository: str, license: str | None, base_model: str | None) -> None:
    require_packages("sharing a model", "hub", "huggingface_hub")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    named = (
        ("repository", repository, "me/small"),
        ("base_model", base_model, "timm/deit_tiny_patch16_224.fb_in1k"),
    )
    for key, name, example in named:
        if name is None:
            continue
        try:
            validate_repo_id(name)
            whole = "/" in name
        except HFValidationError:
            whole = False
        if not whole:
            raise ConfigError(f"{key} must be OWNER/NAME on the hub, such as '{example}', got {name!r}")
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license)):
        raise ConfigError(
            f"license must be one of the hub's identifiers, such as 'apache-2.0', 'mit' or 'other', got {license!r}"
        )


def _is_classifier(model: nn.Module) -> bool:
    try:
        models.require_classifier(model)
    except UnsupportedModelError:
        return False
    return True


# The parts of a card


def _introduction(config: ModelConfig, license: str | None, base_model: str | None) -> str:
    if config.library is None:
        what = "A Vision Transformer in a module of its author's own"
    else:
        what = f"`{config.architecture}` of {config.library}"
    text = f"{what}, made smaller by structured pruning with gohsp. It is an ordinary dense model, without masks."
    if base_model:
        text += f" It was made of [{base_model}](https://huggingface.co/{base_model})."
    return f"{text} Licence: {license}." if license else text


@dataclass(frozen=True)
class _Before:
    """What is known of the model before the cut."""

    widths: Widths
    params: int
    macs: int


def _before(config: ModelConfig, folder: Path, dense: Network | None) -> _Before | None:
    """From its description, or else from the report of the run whose folder this is.

    The specification in a config does not tell: it holds what loading needs, and leaves out what widths replace.
    """
    now = widths_from_json(config.widths)
    if dense is not None:
        check_widths(dense, now)
        return _Before(dense.widths, count_params(dense), count_macs(dense))
    if not (folder / report.FILE).exists():
        return None
    content = report.read(folder)
    if content.plan.pruned != now:
        raise CheckpointError(
            f"'{folder / report.FILE}' is the report of a model with other widths than '{folder / checkpoint.CONFIG}'; "
            "take it away, or give the folder of a run as the run left it"
        )
    return _Before(content.plan.dense, content.dense.params, content.dense.macs)


def _cut(config: ModelConfig, before: _Before | None) -> list[str]:
    """What the model costs and how wide it is, beside what it was cut from."""
    was = {} if before is None else widths_to_json(before.widths)
    params, macs = (None, None) if before is None else (before.params, before.macs)
    counts = (("parameters", params, config.params), ("multiply-accumulates of an image", macs, config.macs))
    asked = config.made_by.get("budget")
    return [
        "## What was cut" if before else "## Size",
        *([f"Asked for: {_text(asked)}."] if asked else []),
        _table(("", "before", "now"), [(name, _count(then), _count(now, then)) for name, then, now in counts]),
        "<details><summary>Widths of all sub-layers</summary>",
        _table(
            ("sub-layer", "before", "now"),
            [(_text(name), _width(was.get(name)), _width(now)) for name, now in config.widths.items()],
        ),
        "</details>",
    ]


def _count(count: int | None, before: int | None = None) -> str:
    if count is None:
        return "–"
    return quantity(count) + (f" ({signed(relative(count, before), 1, ' %')})" if before else "")


def _width(of: Mapping[Any, int] | None) -> str:
    if of is None:
        return "–"
    if not any(of.values()):
        return "gone"
    return ", ".join(f"{_FIELDS[field]} {count}" for field, count in of.items())


def _metrics(config: ModelConfig) -> list[str]:
    known = {name: value for name, value in config.metrics.items() if value is not None}
    if not known:
        return []
    return [
        "## Measured",
        _table(("metric", "value"), [(_METRICS.get(name) or _text(name), _text(of)) for name, of in known.items()]),
    ]


def _loading(config: ModelConfig, outline: nn.Module | None, repository: str) -> list[str]:
    """Three lines, and how images get in."""
    if outline is None:
        images, how = "images", ", into=module)  # a module of the code that it was made of"
    else:
        channels, height, width = models.input_size(outline)
        images, how = f"torch.rand(1, {channels}, {height}, {width})", ")"
    code = f'model = gohsp.load("{repository}"{how}\noutput = model({images})'
    imports = "import gohsp" if outline is None else "import gohsp, torch"
    prepared = outline is not None and bool(config.preprocessing.mean)
    extras = dict.fromkeys(name for name in ("hub", config.library, "timm" if prepared else None) if name)
    install = f"`pip install 'gohsp[{','.join(extras)}]'`, then"
    parts = ["## How to load it", install, f"```python\n{imports}\n\n{code}\n```"]
    if prepared:
        made = "transform = data.eval_transform(data.Preprocessing.from_model(model))"
        parts.append(f"PIL images are prepared by `from gohsp import data` and `{made}`.")
    return parts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: Any) -> str:
    """What a file holds, for one cell of a table: a line of plain text, whatever it is."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return _MARKUP.sub(r"\\\1", text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


# The upload


def _copy(source: Path, folder: Path) -> None:
    """Copy a model folder's files, once it is known to be one."""
    checkpoint.read_config(source)
    checkpoint.read_header(source / WEIGHTS, (*checkpoint.FLOATING, *checkpoint.COUNTING))
    for name in FILES:
        if (source / name).is_file():
            with storing(folder / name):
                shutil.copyfile(source / name, folder / name)


def _uploaded(folder: Path, repository: str, private: bool | None, token: Token) -> str:
    """Upload a folder; the hash of the commit."""
    from huggingface_hub import HfApi

    version = importlib.metadata.version("gohsp")
    hub = HfApi(token=token, library_name="gohsp", library_version=version)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if private is not None and bool(hub.repo_info(repository).private) != private:
            is_there, asked = ("public", "private") if private else ("private", "public")
            raise ConfigError(
                f"'{repository}' is there already, and is {is_there}, not {asked}; change that on the hub, or leave "
                "private out"
            )
        done = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Model of gohsp {version}",
            delete_patterns=[PROCESSOR],  # of a model that stood there before, unless this one has its own
        )
    except GohspError:
        raise
    except Exception as error:  # errors of the hub's client and its HTTP library have no base class in common
        raise StorageError(
            f"'{repository}' cannot be written on the hub ({one_line(error)}); check the name, the "
            "network, and that the token may write there"
        ) from error
    return done.oid
