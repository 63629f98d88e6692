"""Plausible reports as JSON, and what tests ask of a page."""

from __future__ import annotations

import base64
import copy
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image


def make_content(blocks: int = 12, heads: int = 3, units: int = 768, seed: int = 0) -> dict[str, Any]:
    """Plausible JSON of a fine-tuning run of a ViT with `blocks` blocks of `heads` heads of 64 dimensions."""
    rng = np.random.default_rng(seed)
    dense, pruned, kept, scores, transition = {}, {}, {}, {}, {}

    def pick(total: int, count: int) -> list[int]:
        return sorted(int(i) for i in rng.choice(total, count, replace=False))

    for block in range(blocks):
        attention, ffn = f"blocks.{block}.attn", f"blocks.{block}.mlp"
        edges = rng.uniform(0.1, 0.69, (heads, heads))
        edges = edges + edges.T
        np.fill_diagonal(edges, 0)
        matrix = edges / edges.sum(1, keepdims=True) if heads > 1 else np.ones((1, 1))
        score = rng.dirichlet(np.full(heads, 6.0))
        stay = max(1, heads - int(rng.integers(0, heads // 2 + 1)))
        qk, vo = int(rng.choice([16, 24, 32])), int(rng.choice([32, 48, 64]))
        hidden = units - 64 * int(rng.integers(1, units // 80)) if block > 0 else units
        dense |= {attention: {"heads": heads, "qk": 64, "vo": 64}, ffn: {"units": units}}
        pruned |= {attention: {"heads": stay, "qk": qk, "vo": vo}, ffn: {"units": hidden}}
        kept[attention] = {
            "heads": sorted(int(h) for h in np.argsort(score)[::-1][:stay]),
            "qk": [pick(64, qk) for _ in range(stay)],
            "vo": [pick(64, vo) for _ in range(stay)],
        }
        kept[ffn] = {"units": pick(units, hidden)}
        scores[attention], transition[attention] = score.tolist(), matrix.tolist()

    def curve(epochs: int, first: float, last: float) -> list[dict[str, Any]]:
        top1 = last + (first - last) * np.exp(-1.5 * np.arange(epochs))
        return [
            {
                "epoch": i + 1,
                "train_loss": float(2.4 - value / 50),
                "top1": float(value),
                "loss": float(2.2 - value / 50),
                "learning_rate": 1e-4 * (1 - i / epochs),
                "seconds": 61.5,
            }
            for i, value in enumerate(top1)
        ]

    steps = 24
    return {
        "schema_version": 4,
        "gohsp": "0.2.0",
        "created": "2025-11-22T17:30:00+00:00",
        "command": ["gohsp", "prune", "settings/deit tiny.toml", "--budget", "params=-40%"],
        "seed": 0,
        "machine": {"device": "cpu", "processor": "Example CPU 9000", "cores": 2, "python": "3.11.7"},
        "versions": {"torch": "2.8.0", "timm": "1.0.31"},
        "method": "gohsp",
        "model": {
            "library": "timm",
            "architecture": "deit_tiny_patch16_224",
            "arguments": {"num_classes": 10, "img_size": 112},
        },
        "data": {
            "source": "hfds/imagewoof-160",
            "train_split": "train",
            "validation_split": "validation",
            "image_size": 112,
            "classes": 10,
            "calibration_images": 1024,
            "train_images": 5000,
            "validation_images": 2000,
            "unreadable_images": 0,
        },
        "budget": {"kind": "params", "requested": "params=-40%", "limit": 3_316_000, "achieved": 3_315_000},
        "dense": {
            "params": 5_525_000,
            "macs": 320_000_000,
            "top1": 83.8,
            "top5": 98.5,
            "loss": 0.52,
            "n": 2000,
        },
        "dense_retrained": {
            "params": 5_525_000,
            "macs": 320_000_000,
            "top1": 84.25,
            "top5": 98.6,
            "loss": 0.50,
            "n": 2000,
        },
        "pruned": {
            "params": 3_315_000,
            "macs": 176_000_000,
            "top1": 81.7,
            "top5": 98.0,
            "loss": 0.61,
            "n": 2000,
        },
        "fidelity": {
            "objective": "classification",
            "images": 128,
            "distance": 0.321,
            "predicted_distance": 0.25,
            "agreement": 79.6,
        },
        "plan": {"dense": dense, "pruned": pruned, "kept": kept, "stages": 2},
        "ranking": {
            "method": "chain",
            "edge": "jsd",
            "scope": "layer",
            "damping": 0.3,
            "teleport": "contribution",
            "scores": scores,
            "transition": transition,
            "iterations": 17,
            "residual": 3.1e-11,
            "images": 1000,
            "notes": [],
            "steps": 2,
            "left_at": {name: [1 + head % 2 for head in range(len(of))] for name, of in scores.items()},
        },
        "admm": {
            "status": "converged",
            "metric": "data",
            "penalty": "decoupled",
            "trace": [
                {
                    "step": i,
                    "epoch": (i + 1) / steps,
                    "rho": float(0.004 * 50 ** (i / (steps - 1))),
                    "primal": float(0.6 * np.exp(-i / 6)),
                    "dual": float(0.2 * np.exp(-i / 9)) if i else 0.0,
                    "flips": max(0, 40 - 2 * i),
                }
                for i in range(steps)
            ],
            "loss_before_cut": 0.5712,
            "loss_after_cut": 0.5934,
        },
        "equality": {"max_relative_difference": 3e-7, "tolerance": 1e-5, "images": 8},
        "curves": {
            "dense": curve(5, 55.0, 83.8),
            "admm": curve(1, 76.9, 76.9),
            "finetune": curve(2, 80.1, 81.7),
            "dense_retrained": curve(3, 83.9, 84.25),
        },
        "timings": {"train dense": 1850.0, "rank": 34.2, "allocate": 210.0, "admm": 410.0, "finetune": 805.5},
        "config": {"seed": 0, "budget": "params=-40%", "train": {"epochs": 3, "optimizer": "adamw"}},
    }


def one_shot(content: dict[str, Any]) -> dict[str, Any]:
    """The same run without any training."""
    content = {key: value for key, value in content.items() if key not in ("admm", "dense_retrained")}
    return content | {"method": "oneshot", "curves": {}}


def edited(content: dict[str, Any], path: str, value: Any = None, *, drop: bool = False) -> dict[str, Any]:
    """A deep copy with the entry at a path such as "plan/dense/blocks.0.mlp" set, or dropped."""
    content = copy.deepcopy(content)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    level: Any = content
    for part in parents:
        level = level[part]
    if drop:
        del level[last]
    else:
        level[last] = value
    return content


def without(content: dict[str, Any], sublayer: str) -> dict[str, Any]:
    """A deep copy in which a sub-layer is removed whole."""
    content = copy.deepcopy(content)
    table = content["plan"]["pruned"][sublayer]
    content["plan"]["pruned"][sublayer] = dict.fromkeys(table, 0)
    content["plan"]["kept"][sublayer] = {key: [] for key in table}
    return content


class Page(HTMLParser):
    """What the tests ask of a page: its tags with attributes, its ids and text, and that tags balance."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def labels(self) -> list[str | None]:
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"]


def without_labels(content: dict[str, Any]) -> dict[str, Any]:
    """What the one-shot method writes."""
    content = copy.deepcopy(one_shot(content))
    for name in ("dense", "pruned"):
        content[name] = {key: content[name][key] for key in ("params", "macs")}
    for key in ("validation_split", "train_images", "validation_images", "unreadable_images"):
        del content["data"][key]
    return content


def of_features(content: dict[str, Any], objective: str = "features") -> dict[str, Any]:
    """A one-shot run on a model of the user's own that tells no classes apart."""
    content = without_labels(content)
    content["fidelity"] |= {"objective": objective, "agreement": None, "predicted_distance": None}
    content["model"] = {"architecture": "MyBackbone"}
    del content["data"]["classes"]
    return content


def sampled(content: dict[str, Any]) -> dict[str, Any]:
    """The same run with three held-out images, two heads of its first attention, and outputs that are maps."""

    def picture(*size: int) -> str:
        file = io.BytesIO()
        Image.fromarray(np.arange(np.prod(size), dtype=np.uint8).reshape(size)).save(file, "webp")
        return base64.b64encode(file.getvalue()).decode()

    heads = [{"attention": "blocks.0.attn", "head": head, "maps": [picture(7, 7)] * 3} for head in (2, 0)]
    photos, maps = [picture(96, 128)] * 3, [picture(64, 64)] * 3
    return content | {"samples": {"images": photos, "heads": heads, "before": maps, "after": maps}}
