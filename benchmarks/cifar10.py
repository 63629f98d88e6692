"""CIFAR-10: gohsp, Torch-Pruning and training from scratch, side by side with the same epochs (``comparison.py``).

    pip install 'gohsp[hf,bench]'
    python benchmarks/cifar10.py --data hfds/cifar10                                            # one GPU

On two CPU cores, with DeiT-Tiny's weights, many hours:

    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_deit_tiny.toml \
        --model deit_tiny_patch16_224 --weights deit_tiny_patch16_224.safetensors --methods start
    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_short.toml \
        --dense runs/cifar10_deit_tiny/dense --methods start dense oneshot no-ADMM gohsp no-ADMM-random
    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_short.toml \
        --dense runs/cifar10_deit_tiny/dense --methods hessian/isomorphic/heads taylor/isomorphic/heads \
        --budgets params=-40% params=-60%
    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_short.toml \
        --dense runs/cifar10_deit_tiny/dense --methods hessian/isomorphic/blocks taylor/isomorphic/blocks \
        --budgets params=-75%

A third of that time, at 64 px:

    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_64px.toml \
        --model deit_tiny_patch16_224 --weights deit_tiny_patch16_224.safetensors --methods start
    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_short.toml \
        --dense runs/cifar10_64px/dense --out runs/cifar10_short_64px \
        --results benchmarks/results/cifar10_short_64px.json --methods start dense oneshot no-ADMM gohsp

and Torch-Pruning as above. The dense model is trained on the way, once. The two of Torch-Pruning's methods are those
that kept most of a user's own data at -60 % by held-out accuracy (``own_data.py``); whole heads and hidden units alone
do not reach -75 %.
"""

from __future__ import annotations

from pathlib import Path

from comparison import METHODS, parser_of, run

if __name__ == "__main__":
    parser = parser_of(
        __doc__,
        model="vit_small_patch16_224",
        recipe=Path("recipes/cifar10_vit_small.toml"),
        test_split="test",
        budgets=["params=-40%", "params=-60%", "params=-75%"],
        methods=METHODS,
    )
    run(parser.parse_args(), "cifar10")
