"""The README and the site's pages: their Python runs, their links lead somewhere, and nothing public goes unsaid.

The blocks of a page run in one namespace, in a folder of their own, where tiny random models stand for what a page has
fetched. (Tools that make one test a block need all blocks of a page in one worker, which the suite does not promise.)
In front of a block a page may say, in a comment that readers do not see, what the block is given (``<!-- given: CODE
-->``), or why no test can run it (``<!-- not run: REASON -->``).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gohsp
from conftest import randomise
from gohsp.config import from_mapping
from gohsp.data import Preprocessing, eval_transform
from test_hub import Hub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"((?:^<!-- .*? -->\n)*)^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
GIVEN, NOT_RUN = re.compile(r"<!-- given: (.*?) -->", re.DOTALL), re.compile(r"<!-- not run: (.*?) -->", re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {"docs/training.md"}
"""Pages whose blocks a test of their own runs."""

UNTRIED = {"docs/report.md": 1}
"""How many blocks of a page no test runs."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tiny(name: str, *, pretrained: bool = False, create: Any = timm.create_model, **arguments: Any) -> nn.Module:
    """``timm.create_model`` of tiny models with random weights, whatever is asked for."""
    return randomise(create(name, **{"num_classes": 5, **arguments, **TINY_SIZES}), 0).eval()


TINY_SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def data_set(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """A local data set of Hugging Face's layout, with labels."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").resolve())
    paths = [f"photos/train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(20)]
    columns = {"image": paths, "label": [0, 1] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    Path(folder).mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(f"{folder}/train-00000-of-00001.parquet")


@functools.cache
def made_run(folder: Path) -> Path:
    """A run of the command line's, on noise."""
    settings = from_mapping({"device": "cpu", "precision": "no"})
    gohsp.run(tiny("vit_tiny_patch16_224"), "photos", "params=-20%", folder, config=settings)
    return folder


def finished_run(home: Path, folder: str) -> None:
    """Put that run into a folder."""
    shutil.copytree(made_run(home / "run"), folder)


class Pooling(nn.Module):
    """A model whose output has several fields."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny("vit_tiny_patch16_224", num_classes=0)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.vit(images)
        return {"pooler_output": pooled, "pooled": pooled}


class Towers(nn.Module):
    """A model with a tower for images."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model, self.text_model = tiny("vit_tiny_patch16_224"), nn.Embedding(50, 32)

    def forward(self, images: Tensor) -> Tensor:
        return self.vision_model(images)


class Block(nn.Module):
    """The block that the page on families describes, of parts that test_families has."""

    __module__ = "mine"

    def __init__(self, dim: int) -> None:
        from test_families import FeedForward, OwnAttention

        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), OwnAttention(dim, 4)
        self.norm2, self.ff = nn.LayerNorm(dim), FeedForward(dim, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Turned(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def own_blocks() -> nn.Module:
    """A model of classes that are in no library."""
    patches = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2))
    return nn.Sequential(patches, Turned(), Block(32), Block(32), nn.Flatten(1), nn.Linear(32 * 4, 5)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that a page finds itself in, and the names that it takes for granted."""
    folder = tmp_path_factory.mktemp("world")
    for i in range(20):
        for place in ("photos/train/cat", "photos/train/dog", "photos/val/cat", "photos/val/dog", "photographs"):
            photograph(folder / place / f"{i}.jpg", i)
    photograph(folder / "photo.jpg", 0)
    model = tiny("vit_tiny_patch16_224")
    images = list(torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(10))
    small = gohsp.prune(model, images, "params=-30%").model
    gohsp.save(small, folder / "small")
    gohsp.save(small, folder / "runs/mine")
    labelled = TensorDataset(torch.cat(images), torch.arange(40) % 5)
    return folder, {
        "model": model,
        "classifier": model,
        "small": small,
        "images": images,
        "probe": images[0][:4],
        "loader": DataLoader(labelled, batch_size=10),
    }


@pytest.fixture
def namespace(world: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder, names = world
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.setenv("CI", "true")  # in which OpenVINO tells nobody that it is used
    monkeypatch.setattr(timm, "create_model", tiny)
    monkeypatch.setattr(gohsp.families, "_known", gohsp.families._known)  # forgotten after this test
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(tmp_path / "hub"))
    helpers = {
        "data_set": functools.partial(data_set, monkeypatch),
        "finished_run": functools.partial(finished_run, folder),
    }
    imported = {
        "gohsp": gohsp,
        "nn": nn,
        "Path": Path,
        "SimpleNamespace": SimpleNamespace,
        "timm": timm,
        "torch": torch,
    }
    makers = {"pooling": Pooling, "towers": Towers, "own_blocks": own_blocks}
    return {"__name__": "page", **makers, **helpers, **imported, **names}


WITH_CODE = [page for page in PAGES if name_of(page) not in ELSEWHERE and BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_python_of_a_page_runs(page: Path, namespace: dict[str, Any]):
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if NOT_RUN.search(block[1]):
            continue
        for code in GIVEN.findall(block[1]):
            exec(code, namespace)
        above = "\n" * text.count("\n", 0, block.start(2))  # so that a traceback shows the page's line
        exec(compile(above + block[2], page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if TOML.search(page.read_text())], ids=name_of)
def test_the_settings_of_a_page_are_taken(page: Path):
    for block in TOML.finditer(page.read_text(encoding="utf-8")):
        from_mapping(tomllib.loads(block[1]))


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("size", "crop_pct"), [((60, 45), 0.9), ((45, 61), 0.875), ((32, 32), 1.0)])
def test_without_gohsp_an_image_becomes_what_evaluation_makes_of_it(
    crop_mode: str, size: tuple[int, int], crop_pct: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    told = {"image_size": (32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2), "crop_pct": crop_pct}
    made = Preprocessing(channels=3, interpolation="bicubic", crop_mode=crop_mode, **told)
    Path("small.onnx.json").write_text(json.dumps({"preprocessing": asdict(made)}))
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    script = next(
        block[2] for block in BLOCK.finditer((ROOT / "docs/tutorials/deploy.md").read_text()) if "crop" in block[2]
    )
    exec(script.partition("session =")[0], names := {})
    expected = eval_transform(made)(Image.open("photo.jpg")).permute(1, 2, 0)
    np.testing.assert_allclose(names["pixels"], expected, atol=1e-5)


def test_few_blocks_are_left_untried():
    marks = {name_of(page): len(NOT_RUN.findall(page.read_text())) for page in PAGES}
    assert {page: count for page, count in marks.items() if count} == UNTRIED


# Links


FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"\]\((?!https?:)([^()\s#]*)(?:#([^()\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", title)).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md"), *ROOT.glob("benchmarks/*/README.md")], ids=name_of)
def test_links_lead_somewhere(page: Path):
    for path, anchor in TARGET.findall(FENCE.sub("", page.read_text())):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


# What is said


def test_every_page_is_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [
        name for page in PAGES[1:] if f": {(name := page.relative_to(ROOT / 'docs').as_posix())}\n" not in nav
    ] == []


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    assert [name for name in gohsp.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page: Path):
    """But for tables and commands, which cannot be broken."""
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []
