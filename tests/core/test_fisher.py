from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import fisher
from gohsp.core.fisher import token_weights
from gohsp.models import describe, stages
from gohsp.structure import ModelStructure


def drawn_classes(model: nn.Module, batches: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """What one generator draws from the predictions, batch after batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [torch.multinomial(model(b).softmax(-1), 1, generator=generator)[:, 0] for b in batches]


def squared_gradients(model: nn.Module, batches: tuple[Tensor, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Sums ``[tokens]`` by block for its two readouts: blocks by hand, zeros added where gradients are wanted."""
    network = stages(model)
    totals = [(torch.zeros(5), torch.zeros(5)) for _ in network.blocks]
    for images, classes in zip(batches, drawn_classes(model, batches, seed), strict=True):
        for i, of_block in enumerate(totals):
            for image, drawn in zip(images, classes, strict=True):
                x = network.embed(image[None])
                probes = [torch.zeros(1, 5, 32, requires_grad=True) for _ in range(2)]
                for j, block in enumerate(network.blocks):
                    written = block.attn(block.norm1(x))
                    x = x + block.ls1(written + probes[0] if i == j else written)
                    written = block.mlp(block.norm2(x))
                    x = x + block.ls2(written + probes[1] if i == j else written)
                network.head(x).log_softmax(-1)[0, drawn].backward()
                for total, probe in zip(of_block, probes, strict=True):
                    total += probe.grad[0].square().sum(-1)
    return totals


@pytest.mark.parametrize(
    "arguments", [{}, {"init_values": 0.5}, {"class_token": False, "global_pool": "avg", "img_size": (8, 40)}]
)
@pytest.mark.parametrize("shares", [(0.3, 1.0), (1.0, 0.2)])
def test_weights_are_mean_squared_gradients_of_drawn_classes(
    arguments: dict, shares: tuple[float, float], make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_model(mlp_ratio=1, **arguments)
    if not model.has_class_token:
        images = images.reshape(len(images), 3, 8, 32).repeat(1, 1, 1, 2)[..., :40].contiguous()
    batches = images[:6].split([4, 2])
    got = token_weights(model, describe(model), batches, attention=shares[0], ffn=shares[1], seed=3)
    for weights, totals in zip(got, squared_gradients(model, batches, seed=3), strict=True):
        for weight, total, share in zip((weights.attention, weights.ffn), totals, shares, strict=True):
            expected = share * total / total.mean() + 1 - share
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
            assert float(weight.mean()) == pytest.approx(1, rel=1e-5)
            assert float(weight.min()) >= 1 - share - 1e-6
            assert weight.dtype == torch.float32


def test_backward_passes_take_few_images_whatever_the_batches(
    model: nn.Module, structure: ModelStructure, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "GRADIENT_IMAGES", 5)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    whole = token_weights(model, structure, [images], attention=0.5, ffn=0.5)
    assert sizes == [5] * 6 + [2]
    for a, b in zip(whole, token_weights(model, structure, images.split(5), attention=0.5, ffn=0.5), strict=True):
        assert torch.equal(a.attention, b.attention)
        assert torch.equal(a.ffn, b.ffn)


def test_no_share_means_no_weights(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    weights = token_weights(model, structure, [images], attention=0.0, ffn=0.0)
    assert [(w.attention, w.ffn) for w in weights] == [(None, None)] * 2
    assert not passes
    for both, one, other in zip(
        token_weights(model, structure, [images], attention=0.5, ffn=0.5),
        token_weights(model, structure, [images], attention=0.5, ffn=0.0),
        token_weights(model, structure, [images], attention=0.0, ffn=0.5),
        strict=True,
    ):
        assert one.ffn is None
        assert other.attention is None
        assert torch.equal(one.attention, both.attention)
        assert torch.equal(other.ffn, both.ffn)


def test_the_last_block_of_a_class_token_model_is_read_at_that_token_alone(
    model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    first, last = token_weights(model, structure, [images], attention=1.0, ffn=1.0)
    only = torch.tensor([5.0, 0, 0, 0, 0])
    torch.testing.assert_close(last.attention, only, rtol=1e-6, atol=0)
    torch.testing.assert_close(last.ffn, only, rtol=1e-6, atol=0)
    for weight in (first.attention, first.ffn):  # other tokens reach it through the last attention
        assert float(weight.min()) > 0.01
        assert float(weight.max()) < 4.9


def test_a_pooled_model_is_read_at_every_token(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model(mlp_ratio=1, class_token=False, global_pool="avg")
    first, last = token_weights(model, describe(model), [images], attention=1.0, ffn=1.0)
    torch.testing.assert_close(last.ffn, torch.ones(4))  # a mean over tokens, with nothing behind it but the head
    for weight in (first.attention, first.ffn, last.attention):
        assert len(weight) == 4
        assert float(weight.min()) > 0.3
        assert not torch.allclose(weight, torch.ones(4), atol=1e-2)


def test_what_no_prediction_depends_on_weighs_all_tokens_alike(
    model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    for weights in token_weights(model, structure, [images], attention=1.0, ffn=1.0):
        assert (weights.attention, weights.ffn) == (None, None)


@pytest.mark.parametrize("frozen", ["all", "embedding and first block", "second attention"])
def test_frozen_parameters_change_nothing(
    frozen: str, model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    expected = token_weights(model, structure, [images], attention=0.7, ffn=0.7)
    modules = {
        "all": [model],
        "embedding and first block": [model.patch_embed, model.blocks[0]],
        "second attention": [model.blocks[1].attn],
    }[frozen]
    for module in modules:
        module.requires_grad_(False)
    if frozen == "embedding and first block":
        model.pos_embed.requires_grad_(False)
        model.cls_token.requires_grad_(False)
    for a, b in zip(token_weights(model, structure, [images], attention=0.7, ffn=0.7), expected, strict=True):
        torch.testing.assert_close(a.attention, b.attention)
        torch.testing.assert_close(a.ffn, b.ffn)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_gradients_and_its_hooks_are_left_alone(
    training: bool, model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    expected = token_weights(model.eval(), structure, [images], attention=1.0, ffn=1.0)
    model.train(training)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter) if i % 2 else None
        parameter.requires_grad_(i % 3 > 0)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with torch.no_grad():  # even where gradients are off
        got = token_weights(model, structure, [images], attention=1.0, ffn=1.0)
    for a, b in zip(got, expected, strict=True):  # dropout was off
        torch.testing.assert_close(a.attention, b.attention)
        assert not a.attention.requires_grad
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all((p.grad is None) if i % 2 == 0 else bool((p.grad == 1).all()) for i, p in enumerate(model.parameters()))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_seed_decides_what_is_drawn(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    def first(seed: int) -> Tensor:
        return token_weights(model, structure, images.split(16), attention=1.0, ffn=1.0, seed=seed)[0].ffn

    state = torch.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(torch.get_rng_state(), state)
