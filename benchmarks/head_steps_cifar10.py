"""``head_steps.py`` on the model that ``cifar10.py`` trained, DeiT-Tiny on CIFAR-10, and with an epoch of training.

    pip install 'gohsp[hf,bench]'
    python benchmarks/head_steps_cifar10.py --data hfds/cifar10 --dense runs/cifar10_deit_tiny/dense
    python benchmarks/head_steps_cifar10.py --data hfds/cifar10 --dense runs/cifar10_64px/dense \
        --out runs/head_steps_cifar10_64px --results benchmarks/results/head_steps_cifar10_64px.json

Each dense model has a folder and a results file of its own.

Training images rank, repair and tell the distance; top-1 is on 2,000 of the held-out images, by which nothing is chosen
here. With half of the heads gone the repaired model is trained for an epoch of 5,000 images as well, as ``cifar10.py``
trains.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from comparison import Bench, first_images, opened, parser_of, settings_of
from head_steps import REPAIRED_ON, Case, make_rows, rankings
from shared import RESULTS, versions

OTHERS, SCORED, TRAINED_ON = 500, 2000, 5000


def case_of(bench: Bench, dense: nn.Module) -> Case:
    """The dense model, images and training of a comparison."""
    few, more = (first_images(bench.train, count) for count in (REPAIRED_ON, REPAIRED_ON + OTHERS))
    others = replace(more, pixels=more.pixels[REPAIRED_ON:], labels=more.labels[REPAIRED_ON:])
    epoch = replace(bench, train=first_images(bench.train, TRAINED_ON), resumable=False)
    scored = first_images(bench.held_out, SCORED)
    return Case(
        dense,
        images=[images for images, _ in bench.batches(few)],
        others=[images for images, _ in bench.batches(others)],
        top1=lambda model: bench.score(model, scored).top1,
        trained=lambda model: epoch.fit("epoch", model, replace(bench.config.finetune, epochs=1), dense),
    )


def main() -> None:
    """Make all rows."""
    arguments = parser_of(__doc__, recipe=Path("recipes/cifar10_short.toml"), test_split="test[:8]", budgets=[])
    arguments.add_argument("--rankings", nargs="+", choices=tuple(rankings()), default=tuple(rankings()))
    arguments.set_defaults(out=Path("runs/head_steps_cifar10"), results=RESULTS / "head_steps_cifar10.json")
    options = arguments.parse_args()
    bench, dense = opened(options)
    settings = settings_of(options, bench.config)
    header = {"versions": versions(), **{name: settings[name] for name in ("data", "recipe")}}
    make_rows(case_of(bench, dense), options.rankings, options.results, header)


if __name__ == "__main__":
    main()
