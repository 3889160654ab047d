"""Weighted prompts: what the reference file does not record, and hidden states times weights."""

from __future__ import annotations

import logging

import pytest
import torch

from library.core.errors import ConfigError
from library.generation import prompt_weighting as pw


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("([a)b]", [("a", 1.0), ("b", 1 / 1.1)]),  # brackets of two kinds may cross
        ("(a:1.2.3) (b:1e3)", [("a:1.2.3", 1.1), (" ", 1.0), ("b:1e3", 1.1)]),
        ("(a\\:1.5)", [("a:1.5", 1.1)]),
        ("((a:2):0.5)", [("a", 1.0)]),
    ],
)
def test_pieces(prompt, expected):
    pieces = pw.parse_weights(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


def test_rows_grow_with_the_prompt_up_to_a_limit():
    assert [pw.rows_needed(count, 3) for count in (0, 1, 75, 76, 225, 226)] == [1, 1, 1, 2, 3, 3]


def test_joined_rows_keep_the_first_begin_and_the_last_end():
    rows = torch.arange(2 * 77).reshape(1, 2, 77)
    assert pw.joined(rows)[0].tolist() == pw.joined_positions(2)
    assert pw.joined(rows[..., None].expand(1, 2, 77, 3)).shape == (1, 152, 3)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 4, generator=generator) + 0.5
    weights = torch.tensor([[1.0, 1.5, 1.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    return hidden, weights


def test_weights_multiply_each_token(states):
    hidden, weights = states
    torch.testing.assert_close(pw.apply_weights(hidden, weights)[0, 1], hidden[0, 1] * 1.5)


@pytest.mark.parametrize(("mode", "size"), [("original", torch.Tensor.mean), ("abs", lambda x, dim: x.abs().mean(dim))])
def test_normalizing_keeps_the_size_of_every_sample(states, mode, size):
    hidden, weights = states
    result = pw.apply_weights(hidden, weights, mode)
    torch.testing.assert_close(size(result, dim=(1, 2)), size(hidden, dim=(1, 2)))
    torch.testing.assert_close(result[1], hidden[1])
    raw = pw.apply_weights(hidden, weights, "none")
    torch.testing.assert_close(result[0] / raw[0], torch.full((5, 4), float((result[0] / raw[0]).mean())))


def test_a_mean_of_zero_is_not_divided_by():
    hidden = torch.tensor([[[1.0, -1.0], [2.0, 0.0]]])
    result = pw.apply_weights(hidden, torch.tensor([[1.0, 0.0]]), "original")
    assert result.tolist() == [[[1.0, -1.0], [0.0, 0.0]]]


def test_half_precision_states_keep_their_dtype(states):
    hidden, weights = states
    assert pw.apply_weights(hidden.bfloat16(), weights, "abs").dtype == torch.bfloat16


def test_unknown_mode_is_refused(states):
    with pytest.raises(ConfigError, match="did you mean 'abs'"):
        pw.apply_weights(*states, mode="abss")


def test_the_signed_mean_is_told_about(caplog):
    with caplog.at_level(logging.WARNING):
        pw.warn_of_signed_mean("abs")
        assert not caplog.records
        pw.warn_of_signed_mean("original")
    assert "signed mean" in caplog.text


def test_prompts_of_regions():
    assert pw.sub_prompts("a cat AND a dog AND sand") == ["a cat", "a dog", "sand"]
    assert pw.sub_prompts("SAND ANDES") == ["SAND ANDES"]
