"""What a report shows of a few held-out images, against pixels and attention computed by hand."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gohsp import api, config, steps
from gohsp.report import Samples
from gohsp.runs import samples as module
from gohsp.runs.samples import samples
from gohsp.structure import AttentionKept, Kept, SublayerKept, keep_all

GONE = {"blocks.1.attn": (1, 3)}


def pixels(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def looked_at(model: nn.Module, images: Tensor, *, other: nn.Module | None = None, shown: int = 2) -> Samples | None:
    """Samples of a run that takes heads 1 and 3 of the second attention."""
    settings = config.from_mapping({"precision": "no", "data": {"shown": shown}, "calibration": {"holdout": 4}})
    session = api.open_session(model, images, config=settings)
    network = api.models.describe(model, images[:1])
    kept: dict[str, SublayerKept] = {name: keep_all(of) for name, of in network.widths.items()}
    for sub in network.attentions:
        if gone := next((heads for name, heads in GONE.items() if sub.name.endswith(name)), ()):
            kept[sub.name] = without(kept, sub.name, gone)
    ranking = steps.analyse(session, model, network).ranking
    return samples(session, model, model if other is None else other, network, ranking, kept)


def without(kept: Kept, name: str, gone: tuple[int, ...]) -> AttentionKept:
    of = kept[name]
    assert isinstance(of, AttentionKept)
    stay = [index for index, head in enumerate(of.heads) if head not in gone]
    return dataclasses.replace(
        of,
        heads=tuple(of.heads[index] for index in stay),
        qk=tuple(of.qk[index] for index in stay),
        vo=tuple(of.vo[index] for index in stay),
    )


def test_pictures_are_the_first_held_out_images_before_normalisation(model: nn.Module, images: Tensor) -> None:
    found = looked_at(model, images)
    assert found is not None
    assert len(found.images) == 2
    expected = ((images[30:32] * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    assert [pixels(of).tolist() for of in found.images] == expected.tolist()
    assert (found.before, found.after) == ((), ())  # logits are no map
    assert looked_at(model, images, shown=0) is None


def test_veils_are_dark_where_the_class_token_does_not_look(model: nn.Module, images: Tensor) -> None:
    found = looked_at(model, images)
    assert found is not None
    seen: list[Tensor] = []
    block = model.get_submodule("blocks.1")
    with torch.no_grad():
        handle = block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
        model(images[30:32])
        handle.remove()
        q, k, _ = block.attn.qkv(seen[0]).view(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)  # type: ignore[union-attr, operator]
        looks = (q @ k.mT * 8**-0.5).softmax(-1)[:, :, 0, 1:].view(2, 4, 2, 2)
    assert {of.attention for of in found.heads} == {"blocks.1.attn"}
    assert sorted(of.head for of in found.heads[:2]) == [1, 3]  # those that went come first
    assert sorted(of.head for of in found.heads[2:]) == [0, 2]
    for of in found.heads:
        for image, veil in enumerate(of.maps):
            light = 1 - pixels(veil)[..., 3] / 230
            expected = (looks[image, of.head] / looks[image, of.head].max()).sqrt()
            np.testing.assert_allclose(light, expected, atol=0.003)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (197, (224, 224), (14, 14)),
        (196, (224, 224), (14, 14)),
        (1374, (518, 518), (37, 37)),
        (54, (112, 112), (7, 7)),
        (17, (8, 8), (4, 4)),
        (99, (224, 112), (14, 7)),
        (40, (224, 224), (6, 6)),
        (115, (224, 112), None),  # more in front than any model has
    ],
)
def test_tokens_are_a_grid_behind_a_few_others(
    tokens: int, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    assert module._grid(tokens, *size) == grid


class Saliency(nn.Module):
    """A module of the user's own, whose output is a map of one channel or of several."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, nn.ConvTranspose2d(32, channels, 8, 8)
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)[:, 1:]  # type: ignore[operator]
        return self.decoder(tokens.mT.unflatten(-1, (2, 2)))


@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_that_are_maps_are_shown_in_the_same_colours(model: nn.Module, images: Tensor, channels: int) -> None:
    dense = Saliency(model, channels).eval()
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.decoder.weight.mul_(-1)
        before, after = dense(images[30:32]), changed(images[30:32])
    found = looked_at(dense, images, other=changed)
    assert found is not None
    assert len(found.before) == len(found.after) == 2
    for image in range(2):
        shown = [pixels(of[image]) for of in (found.before, found.after)]
        assert shown[0].shape == (16, 16, 3)
        if channels == 1:
            low, high = before[image].min(), before[image].max()
            for of, output in zip(shown, (before, after), strict=True):
                expected = ((output[image, 0] - low) / (high - low)).clamp(0, 1) * 255
                np.testing.assert_allclose(of[..., 0], expected, atol=1)
        else:
            classes = [output[image].argmax(0).numpy() for output in (before, after)]
            colours = {tuple(c) for of in shown for c in of.reshape(-1, 3).tolist()}
            assert len(colours) == len(np.unique(classes)) > 1
            for of, strongest in zip(shown, classes, strict=True):
                for index in np.unique(strongest):
                    assert len(np.unique(of[strongest == index], axis=0)) == 1
                assert len({tuple(c) for c in of.reshape(-1, 3).tolist()}) == len(np.unique(strongest))


def test_what_has_no_grid_of_an_image_is_no_map() -> None:
    images = torch.zeros(2, 3, 32, 32)
    assert module._are_maps(torch.zeros(2, 1, 8, 8), images)
    assert module._are_maps(torch.zeros(2, 32, 32), images)
    for shape in ((2, 10), (2, 17, 32), (2, 64, 4, 4), (2, 5, 8, 16)):
        assert not module._are_maps(torch.zeros(shape), images)
