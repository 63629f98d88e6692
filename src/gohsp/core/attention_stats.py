"""Streaming statistics of attention heads: edges between them, and how much each one matters (design, section 3).

Every sum has a fixed size, whatever the number of images; one batch of attention maps lives at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.activations import attention_rows, observe_inputs, readout_gain
from gohsp.errors import DataError, NonFiniteError
from gohsp.structure import BlockStructure, ModelStructure

Edge = Literal["jsd", "kl", "similarity", "cosine", "cka"]
EDGES: tuple[Edge, ...] = ("jsd", "kl", "similarity", "cosine", "cka")
Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = ("layer", "global")

# Relative to the mean variance of a block's head outputs: dimensions that are dead or copies of each
# other make the Gram matrix singular, and must not turn the residuals into noise.
_RIDGE = 1e-6
# Entries of one head's attention maps that are compared at a time: small enough to stay in cache.
_CHUNK = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadStatistics:
    """What calibration images tell about every head. Nodes are heads, block by block.

    Attributes:
        heads: Heads of each block.
        images: Images seen.
        edges: Edge weights ``[nodes, nodes]`` of each graph, zero on the diagonal: one graph over all
            heads (scope ``global``) or one a block (scope ``layer``).
        contribution: Root mean squared norm ``[nodes]`` of what a head adds to the residual stream,
            centred over images and tokens.
        residual: The same for the part of it that no linear map of the block's other heads can give ``[nodes]``.
        fisher: Second-order estimate of the KL divergence ``[nodes]``, in nats, that zeroing a head causes; None
            where it was not asked for.
        fisher_residual: The same for zeroing a head and refitting the block's other heads ``[nodes]``, or None.
    """

    heads: tuple[int, ...]
    images: int
    edges: tuple[Tensor, ...]
    contribution: Tensor
    residual: Tensor
    fisher: Tensor | None
    fisher_residual: Tensor | None
