"""A user's own data: DeiT-Tiny fine-tuned to imagewoof-160, gohsp and Torch-Pruning with the same epochs.

    pip install 'gohsp[hf,bench]'
    python benchmarks/own_data.py --data hfds/imagewoof-160 --weights deit_tiny_patch16_224.safetensors

A tenth of the training images is held out for choices; the validation split is read once a method (``comparison.py``
says what the methods are). Two CPU cores take about two hours.
"""

from __future__ import annotations

from pathlib import Path

from comparison import PEERS, parser_of, run

if __name__ == "__main__":
    parser = parser_of(
        __doc__,
        model="deit_tiny_patch16_224",
        recipe=Path("recipes/own_data.toml"),
        test_split="validation",
        budgets=["params=-40%", "params=-60%"],
        methods=("start", "dense", "gohsp", "no-ADMM", *PEERS),
    )
    run(parser.parse_args(), "own_data")
