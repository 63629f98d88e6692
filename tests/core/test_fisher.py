from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core.fisher import TokenWeightFitter, blended
from gohsp.core.gradients import differentiated
from gohsp.core.objective import Objective, classification, features
from gohsp.models import describe, resize
from gohsp.structure import Attention, Ffn, Network, absent

BOTH = {Attention: 1.0, Ffn: 1.0}


def token_weights(
    model: nn.Module,
    network: Network,
    batches: Iterable[Tensor],
    share: dict[type, float],
    *,
    objective: Objective | None = None,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    fitter = TokenWeightFitter()
    for gradients in differentiated(model, network, objective or classification(), batches, draws=draws, seed=seed):
        fitter.update(gradients)
    return blended(fitter.weights, {sub.name: share.get(type(sub), 0.0) for sub in network.present})


def squared_gradients(
    model: Any, network: Network, objective: Objective, batches: tuple[Tensor, ...], *, draws: int, seed: int
) -> dict[str, Tensor]:
    """Sums ``[tokens]`` by sub-layer, image by image: zeros added to what a readout writes, and a gradient by them.

    The draws are those of one generator, batch after batch; of a batch's draw an image's part alone is differentiated.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = {sub.name: torch.zeros(sub.tokens) for sub in network.present}
    for images in batches:
        with torch.no_grad():
            dense = objective.output(model(images))
        states = []
        for _ in range(draws):
            states.append(generator.get_state())
            objective.draw(dense, generator)
        for state in states:
            for i, image in enumerate(images):
                probes = {sub.name: torch.zeros(1, sub.tokens, 32, requires_grad=True) for sub in network.present}
                hooks = [
                    model.get_submodule(sub.readout.module).register_forward_hook(
                        lambda _module, _args, written, probe=probes[sub.name]: written + probe
                    )
                    for sub in network.present
                ]
                output = torch.cat([dense[:i], objective.output(model(image[None])), dense[i + 1 :]])
                for hook in hooks:
                    hook.remove()
                drawn = objective.draw(output, torch.Generator().set_state(state))
                found = torch.autograd.grad(drawn, list(probes.values()))
                for name, gradient in zip(probes, found, strict=True):
                    totals[name] += gradient[0].square().sum(-1)
    return totals


@pytest.mark.parametrize(
    "arguments", [{}, {"init_values": 0.5}, {"class_token": False, "global_pool": "avg", "img_size": (8, 40)}], ids=str
)
@pytest.mark.parametrize("share", [{Attention: 0.3, Ffn: 1.0}, {Attention: 1.0, Ffn: 0.2}], ids=["attention", "ffn"])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("of", [classification(), features()], ids=["classes", "features"])
def test_weights_are_mean_squared_gradients_of_draws(
    arguments: dict[str, Any],
    share: dict[type, float],
    draws: int,
    of: Objective,
    make_model: Callable[..., Any],
    images: Tensor,
) -> None:
    model = make_model(mlp_ratio=1, **arguments)
    if not model.has_class_token:
        images = images.reshape(len(images), 3, 8, 32).repeat(1, 1, 1, 2)[..., :40].contiguous()
    batches, network = images[:6].split([4, 2]), describe(model)
    got = token_weights(model, network, batches, share, objective=of, draws=draws, seed=3)
    totals = squared_gradients(model, network, of, batches, draws=draws, seed=3)
    assert set(got) == set(totals) == set(network.widths)
    for sub in network.present:
        total, part, weight = totals[sub.name], share[type(sub)], got[sub.name]
        torch.testing.assert_close(weight, part * total / total.mean() + 1 - part, rtol=1e-3, atol=1e-4)
        assert float(weight.mean()) == pytest.approx(1, rel=1e-5)
        assert float(weight.min()) >= 1 - part - 1e-6
        assert weight.dtype == torch.float32


def test_no_share_means_no_weights(model: nn.Module, network: Network, images: Tensor) -> None:
    both = token_weights(model, network, [images], {Attention: 0.5, Ffn: 0.5})
    assert token_weights(model, network, [images], {}) == {}
    for kind, other in ((Attention, Ffn), (Ffn, Attention)):
        one = token_weights(model, network, [images], {kind: 0.5, other: 0.0})
        assert set(one) == {sub.name for sub in network.present if isinstance(sub, kind)}
        assert all(torch.equal(weight, both[name]) for name, weight in one.items())


def test_the_last_block_of_a_class_token_model_is_read_at_that_token_alone(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    weights = token_weights(model, network, [images], BOTH)
    for name in ("blocks.1.attn", "blocks.1.mlp"):
        torch.testing.assert_close(weights[name], torch.tensor([5.0, 0, 0, 0, 0]), rtol=1e-6, atol=0)
    for name in ("blocks.0.attn", "blocks.0.mlp"):  # other tokens reach it through the last attention
        assert float(weights[name].min()) > 0.01
        assert float(weights[name].max()) < 4.9


def test_a_pooled_model_is_read_at_every_token(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model(mlp_ratio=1, class_token=False, global_pool="avg")
    weights = token_weights(model, describe(model), [images], BOTH)
    torch.testing.assert_close(weights.pop("blocks.1.mlp"), torch.ones(4))  # a mean over tokens, and the head behind it
    for weight in weights.values():
        assert len(weight) == 4
        assert float(weight.min()) > 0.3
        assert not torch.allclose(weight, torch.ones(4), atol=1e-2)


def test_what_no_output_depends_on_weighs_all_tokens_alike(model: Any, network: Network, images: Tensor) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    assert token_weights(model, network, [images], BOTH) == {}


@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.1.mlp"])
def test_an_absent_sublayer_has_no_weights(gone: str, model: nn.Module, network: Network, images: Tensor) -> None:
    resize(model, {**network.widths, gone: absent(network.widths[gone])})
    assert set(token_weights(model, describe(model), [images], BOTH)) == set(network.widths) - {gone}


def test_weights_do_not_depend_on_the_batches_but_on_the_seed(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    def weights(size: int, seed: int) -> dict[str, Tensor]:
        return token_weights(model, network, images.split(size), BOTH, objective=features(), seed=seed)

    for name, weight in weights(32, 1).items():
        torch.testing.assert_close(weight, weights(8, 1)[name])
        assert torch.allclose(weight, weights(32, 2)[name]) == name.startswith("blocks.1")  # one token counts there
