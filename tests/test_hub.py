"""Sharing a model: its card, the upload, and the way back through the hub's cache."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor, nn

import gohsp
from gohsp import cli
from gohsp.errors import CheckpointError, ConfigError, PlanError, StorageError

HERE = "me/small"


class Hub:
    """A hub whose repositories are in the cache at once, laid out as the hub's client lays them out."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.made, self.private = cache, [], None
        self.refused: Exception | None = None

    def __call__(self, **options: Any) -> Hub:
        inspect.signature(HfApi).bind(**options)  # what the real one takes
        self.options = options
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        inspect.signature(HfApi.create_repo).bind(self, name, private=private, exist_ok=exist_ok)
        if self.refused:
            raise self.refused
        if name not in self.made:
            self.made.append(name)
            self.private = bool(private)

    def repo_info(self, _name: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]) -> Any:
        assert "gohsp" in commit_message
        given = {"repo_id": repo_id, "folder_path": folder_path, "commit_message": commit_message}
        inspect.signature(HfApi.upload_folder).bind(self, **given, delete_patterns=delete_patterns)
        self.deleted, self.uploaded = delete_patterns, sorted(file.name for file in folder_path.iterdir())
        contents = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        commit = hashlib.sha1(b"".join(contents.values())).hexdigest()
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        for part in ("blobs", f"snapshots/{commit}", "refs"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (repository / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob.name}")
        (repository / "refs" / "main").write_text(commit)
        return SimpleNamespace(oid=commit)

    def card(self, commit: str) -> str:
        return (self.cache / "models--me--small" / "snapshots" / commit / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


@pytest.fixture
def small(model: nn.Module) -> nn.Module:
    """The tiny model without one FFN, and with a narrower one."""
    widths = {"blocks.0.mlp": gohsp.FfnWidths(units=8), "blocks.1.mlp": gohsp.FfnWidths(units=0)}
    cut = gohsp.models.resized(model, {**gohsp.describe(model).widths, **widths})
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.normal_(std=0.2)
    return cut.eval()


def loads(images: Tensor, small: nn.Module, **options: Any) -> bool:
    with torch.no_grad():
        return torch.equal(gohsp.load(HERE, **options)(images), small(images))


# The way there and back


def test_a_model_comes_back_from_the_hub_at_any_revision(
    there: Hub, small: nn.Module, model: nn.Module, images: Tensor
):
    first = gohsp.push_to_hub(small, HERE, token="hf_secret", private=True)
    assert there.options["token"] == "hf_secret"
    assert there.private
    assert there.uploaded == ["README.md", "config.json", "model.safetensors"]
    assert loads(images, small)
    gohsp.push_to_hub(model, HERE)
    assert loads(images, model)
    assert loads(images, small, revision=first)
    applied = gohsp.apply(model, HERE, revision=first)
    with torch.no_grad():
        assert torch.equal(applied(images), small(images))
    with pytest.raises(CheckpointError, match=r"'me/small' .* at revision 'v9'"):
        gohsp.load(HERE, revision="v9")


def test_the_files_of_a_folder_are_uploaded_and_no_others(there: Hub, small: nn.Module, images: Tensor, tmp_path: Path):
    gohsp.save(small, tmp_path / "small", metrics={"top1": 50.0})
    for name in ("run.log", "settings.toml", "README.md", "preprocessor_config.json"):
        (tmp_path / "small" / name).write_text("{}")
    commit = gohsp.push_to_hub(tmp_path / "small", HERE)
    assert there.uploaded == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert there.deleted == ["preprocessor_config.json"]  # where there was one that this model has not
    assert "| top-1 accuracy (%) | 50 |" in there.card(commit)
    assert (tmp_path / "small" / "README.md").read_text() == "{}"
    assert loads(images, small)


def test_a_card_of_ones_own_is_uploaded_as_it_is(there: Hub, small: nn.Module):
    assert there.card(gohsp.push_to_hub(small, HERE, card="---\nlicense: mit\n---\nMine: ä\n")).endswith("Mine: ä\n")


@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_uploaded_where_others_see_more_or_less_than_was_asked(there: Hub, small: nn.Module, private: bool):
    there.made, there.private = [HERE], not private
    with pytest.raises(ConfigError, match=r"'me/small' is there already, and is (public|private), not"):
        gohsp.push_to_hub(small, HERE, private=private)
    assert not there.cache.exists()
    gohsp.push_to_hub(small, HERE)


def test_a_hub_that_refuses_is_an_error_of_ours(there: Hub, small: nn.Module):
    there.refused = ValueError("401\nUnauthorized")
    with pytest.raises(StorageError, match=r"'me/small' cannot be written on the hub \(401 Unauthorized\)"):
        gohsp.push_to_hub(small, HERE)


# The card


def rows_of(card: str) -> dict[str, list[str]]:
    """The cells behind the first in the lines of a card's tables."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in card.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_card_tells_what_was_cut_and_how_to_load_it(there: Hub, small: nn.Module, model: nn.Module, tmp_path: Path):
    gohsp.save(small, tmp_path, made_by={"budget": "params=-40%"}, metrics={"distance": 0.123456, "agreement": None})
    network = gohsp.describe(model)
    card = gohsp.model_card(tmp_path, HERE, license="apache-2.0", base_model="timm/vit", dense=network)
    assert ModelCard(card).data.to_dict() == {
        "base_model": "timm/vit",
        "library_name": "gohsp",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["gohsp", "structured-pruning", "vision-transformer", "timm"],
    }
    rows = rows_of(card)
    before, now = gohsp.count_params(network), gohsp.count_params(gohsp.describe(small))
    assert rows["parameters"] == [f"{before / 1000:.1f} k", f"{now / 1000:.1f} k (−{100 * (1 - now / before):.1f} %)"]
    assert rows["blocks.0.attn"] == ["heads 4, q/k 8, v/o 8"] * 2
    assert rows["blocks.0.mlp"] == ["units 64", "units 8"]
    assert rows["blocks.1.mlp"] == ["units 64", "gone"]
    assert rows["distance of the outputs from those before the cut"] == ["0.1235"]
    assert "Asked for: params=-40%." in card
    assert "2301.05345" in card
    gohsp.push_to_hub(small, HERE)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    told: dict[str, Any] = {}
    exec(code, told)
    assert told["output"].shape == (1, 5)
    (imported, made) = re.findall(r"prepared by `(.*)` and `(.*)`", card)[0]
    exec(f"{imported}\n{made}", told)
    assert callable(told["transform"])


def test_a_card_claims_no_more_than_is_known(small: nn.Module, tmp_path: Path):
    gohsp.save(small, tmp_path, own=True)
    card = gohsp.model_card(tmp_path, HERE)
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "tags"}
    assert "## Measured" not in card
    assert rows_of(card)["parameters"][0] == rows_of(card)["blocks.0.mlp"][0] == "–"
    assert f'gohsp.load("{HERE}", into=module)' in card


NASTY = [
    "a\n---\nlicense: mit\n---\n# Owned",
    "x | y | z",
    "```\n<script>alert(1)</script>",
    "[click](http://elsewhere)",
    "\u2028---\u2028\x00\x1b[31m",
    "`" * 500,
]


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_no_text_of_a_file_leaves_its_cell(nasty: str, small: nn.Module, tmp_path: Path):
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    gohsp.save(small, plain, own=True, made_by={"budget": "b"}, metrics={"key": "value", "list": ["value"]})
    given = {"made_by": {"budget": nasty}, "metrics": {nasty: nasty, "list": [nasty]}}
    gohsp.save(small, odd, own=True, **given)
    expected, card = gohsp.model_card(plain, HERE), gohsp.model_card(odd, HERE)
    assert ModelCard(card).data.to_dict() == ModelCard(expected).data.to_dict()
    assert len(card.splitlines()) == len(expected.splitlines())
    assert [len(re.split(r"(?<!\\)\|", line)) for line in card.splitlines()] == [
        len(re.split(r"(?<!\\)\|", line)) for line in expected.splitlines()
    ]
    assert not any(mark in card for mark in ("<script>", "](http", "\x1b"))


def test_a_description_of_another_model_is_refused(small: nn.Module, make_model: Any, tmp_path: Path):
    gohsp.save(small, tmp_path)
    with pytest.raises(PlanError):
        gohsp.model_card(tmp_path, HERE, dense=gohsp.describe(make_model(depth=3)))


# The command line, and models of others


def test_the_command_line_pushes_a_folder(
    there: Hub, small: nn.Module, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    gohsp.save(small, tmp_path / "small")
    arguments = ["push", str(tmp_path / "small"), HERE, "--private", "--license", "mit", "--base-model", "timm/vit"]
    assert cli.main(arguments) == 0
    (commit,) = re.findall(r"commit (\w+)", capsys.readouterr().out)
    assert there.private
    assert {"license": "mit", "base_model": "timm/vit"}.items() <= ModelCard(there.card(commit)).data.to_dict().items()
    assert loads(images, small, revision=commit)
    (tmp_path / "card.md").write_text("Mine: ä\n", encoding="utf-8")
    assert cli.main(["push", str(tmp_path / "small"), HERE, "--card", str(tmp_path / "card.md")]) == 0
    (commit,) = re.findall(r"commit (\w+)", capsys.readouterr().out)
    assert there.card(commit) == "Mine: ä\n"
    assert cli.main(["push", str(tmp_path / "small"), HERE, "--card", str(tmp_path / "small")]) == 1
    assert "card '" in capsys.readouterr().err


def test_a_model_is_opened_at_any_revision(
    there: Hub, small: nn.Module, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
):
    first = gohsp.push_to_hub(small, HERE)
    gohsp.push_to_hub(model, HERE)
    for revision, pushed in ((first, small), (None, model)):
        with torch.no_grad():
            opened = gohsp.open_model(HERE, pretrained=True, revision=revision, token=False)
            assert torch.equal(opened(images), pushed(images))
    assert cli.ModelOptions(pretrained=True, revision=first).opened(HERE).blocks[0].mlp.fc1.out_features == 8
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("enough")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="enough"):
        gohsp.open_model(HERE, pretrained=True, revision="v1", token="hf_secret")
    assert (asked["name"], asked["revision"], asked["token"]) == (HERE, "v1", "hf_secret")
