"""Weights of words for T5: which tokens have which, the states by hand, and whole scripts."""

from __future__ import annotations

import numpy
import pytest
import torch

from library.core.errors import AtelierError, ConfigError
from library.generation.text_weighting import on_states, plain_text, token_weights, weighted_states


def tokenizer(text: str, return_offsets_mapping: bool = True, verbose: bool = False) -> dict:
    """Letters are tokens, two blanks none; an end token behind them."""
    places = [(k, k + 1) for k, c in enumerate(text) if c != " "]
    return {"input_ids": [ord(text[k]) for k, _ in places] + [1], "offset_mapping": [*places, (0, 0)]}


def test_marks_go_and_commas_stay() -> None:
    assert plain_text("a (red:1.4) cat, [old], \\(x\\)") == "a red cat, old, (x)"


def test_each_token_has_the_weight_of_its_characters() -> None:
    ids = [*map(ord, "abc"), 1, 0, 0]
    assert token_weights(tokenizer, "a (b:1.5) (c:-1)", ids) == [1.0, 1.5, -1.0, 1.0, 1.0, 1.0]
    assert token_weights(tokenizer, "a b c", ids) == [1.0] * 6
    assert token_weights(tokenizer, "a (b:2) c", ids[:2]) == [1.0, 2.0]  # the rest is cut off
    pair = lambda text, **_: {"input_ids": [7, 1], "offset_mapping": [(0, 3), (0, 0)]}  # noqa: E731
    assert token_weights(pair, "(ab:2)c", [7, 1]) == pytest.approx([5 / 3, 1.0])
    with pytest.raises(ConfigError, match="not tokenized as it is written"):
        token_weights(tokenizer, "a (b:2) c", [*map(ord, "xbc"), 1])


def test_states_go_away_from_those_of_an_empty_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    states, empty = torch.randn(1, 5, 3, generator=generator), torch.randn(1, 2, 3, generator=generator)
    weights = [1.0, 1.4, 0.0, -1.0, 1.0]
    found = weighted_states(states, empty, weights)
    e, e0 = states[0].numpy().astype(numpy.float64), empty[0].numpy().astype(numpy.float64)
    by_hand = numpy.stack([e0[min(k, 1)] + w * (e[k] - e0[min(k, 1)]) for k, w in enumerate(weights)])
    numpy.testing.assert_allclose(found[0].numpy(), by_hand, rtol=1e-5)
    assert torch.equal(found[:, [0, 4]], states[:, [0, 4]])
    assert weighted_states(states, empty, [1.0] * 5) is states
    (listed,) = on_states([states[0]], [empty[0]], weights)
    assert torch.equal(listed, found[0])



def test_pictures_of_flux_and_chroma_follow_weights_and_those_of_1_change_nothing(tmp_path_factory) -> None:
    from library.tiny_models.chroma_tiny import build_tiny_chroma
    from tests.library import test_chroma_inference as chroma
    from tests.library import test_flux_inference as flux
    from tests.tiny import build_tiny_flux

    for module, build in ((flux, build_tiny_flux), (chroma, build_tiny_chroma)):
        folder = tmp_path_factory.mktemp("weights")
        tiny = build(folder / "tiny")

        def picture(name: str, *words: str) -> bytes:
            return module.picture(tiny, folder / name, *words)  # noqa: B023

        plain = picture("plain", "--prompt=a red cat, a dog")
        assert picture("one", "--prompt=a (red:1.0) cat, a dog", "--prompt_weighting") == plain
        assert picture("more", "--prompt=a (red:2.5) cat, a dog", "--prompt_weighting") != plain
        with pytest.raises(AtelierError, match="the latents have values that are not finite"):
            picture("huge", f"--prompt=a (red:1{'0' * 44}) cat", "--prompt_weighting")
        assert picture("marks", "--prompt=a (red:2.5) cat, a dog") != picture("none", "--prompt=a red cat, a dog")


def test_clips_of_wan_follow_weights_too_whose_texts_are_encoded_before_the_denoiser_is_loaded(tmp_path_factory) -> None:
    from tests.library import test_wan_inference as wan

    folder = tmp_path_factory.mktemp("weights")
    tiny = wan.build_tiny_wan(folder / "tiny", num_blocks=3)
    plain = wan.latent(tiny, folder / "plain")
    one = wan.latent(tiny, folder / "one", "--prompt=a (red:1.0) cat", "--prompt_weighting")
    more = wan.latent(tiny, folder / "more", "--prompt=a (red:2.5) cat", "--prompt_weighting")
    assert torch.equal(one, plain) and not torch.equal(more, plain)


def test_families_without_such_an_encoder_refuse_it(tmp_path) -> None:
    from library.generation import lumina_inference

    with pytest.raises(ConfigError, match="families that have one: chroma, flux, sd3, wan"):
        lumina_inference.run([
            f"--pretrained_model_name_or_path={tmp_path}", "--prompt_weighting", f"--output_dir={tmp_path / 'out'}",
        ])  # fmt: skip
