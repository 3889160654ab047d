"""The loss of SRA and its weight, computed a second time by hand."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from library.core.errors import ConfigError
from library.training.alignment.options import SraOptions
from library.training.alignment.sra import Sra, alignment_loss, patches, reader_of, weight_at


def test_the_loss_by_hand() -> None:
    """Smooth L1 with its bend at 0.05, of values brought to mean 0 and deviation 1 over each sample."""
    generator = torch.Generator().manual_seed(0)
    told, wanted = (torch.randn(3, 4, 5, generator=generator) * scale + 2 for scale in (3.0, 0.7))
    found = alignment_loss(told, wanted)
    for row, loss in enumerate(found.tolist()):
        pair = []
        for values in (told, wanted):
            v = values[row].numpy().astype(numpy.float64)
            pair.append((v - v.mean()) / (math.sqrt(((v - v.mean()) ** 2).mean()) + 1e-5))
        d = numpy.abs(pair[0] - pair[1])
        by_hand = numpy.where(d < 0.05, d**2 / 0.1, d - 0.025).mean()
        assert loss == pytest.approx(by_hand, rel=1e-5)


def test_patches_are_the_tokens_of_models_row_by_row() -> None:
    latents = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6).float()  # [B, C, F, h, w]
    tokens = patches(latents, 2)
    assert tokens.shape == (2, 12, 12)
    token = 1 * 6 + 1 * 3 + 2  # frame 1, row 1, column 2
    wanted = [float(latents[1, c, 1, 2 + y, 4 + x]) for c in range(3) for y in range(2) for x in range(2)]
    assert tokens[1, token].tolist() == wanted
    assert torch.equal(patches(latents[:, :, 0], 2), tokens[:, :6])


@pytest.mark.parametrize(("decay", "weights"), [
    ("none", [0.2, 0.2, 0.2, 0.2]), ("linear", [0.2, 0.2, 0.1, 0.0]), ("cosine", [0.2, 0.2, 0.1, 0.0]),
    ("jump", [0.2, 0.0, 0.0, 0.0]),
])  # fmt: skip
def test_the_weight_falls(decay: str, weights: list[float]) -> None:
    options = SraOptions(sra_decay=decay)
    assert [weight_at(options, place) for place in (0.1, 0.2, 0.25, 0.3)] == pytest.approx(weights)


def test_the_reader_has_five_layers_of_falling_width_and_no_decay_of_weights() -> None:
    reader = reader_of(64, 12)
    shapes = [tuple(layer.weight.shape) for layer in reader if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(32, 64), (16, 32), (8, 16), (8, 8), (12, 8)]
    assert all(not layer.bias.any() for layer in reader if isinstance(layer, torch.nn.Linear))
    hook = Sra(SraOptions())
    hook.reader = reader
    (group,) = hook.extra_trainable_params()
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 10


@pytest.mark.parametrize("options", [{"sra_weight": -1.0}, {"sra_decay_start": 0.5}, {"sra_block": -1}])
def test_options_have_ranges(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SraOptions(**options)
