"""How a video script reads texts: layers of the language model, its last norm, factors of the refiner, embedded
guidance in guided steps; by hand."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import ConfigError
from library.generation.hunyuan_video_inference import SCRIPT
from library.generation.hunyuan_video_options import HunyuanVideoModelOptions
from library.scripts.command_line import read_command
from library.strategy_llama_clip import TEXT_LENGTH, padded
from tests.library.test_framepack_inference import latent as framepack_latent
from tests.library.test_framepack_inference import tiny as framepack  # noqa: F401
from tests.library.test_hunyuan_video_inference import latent, run, tiny  # noqa: F401
from tests.tiny import video_words


def encoded(tiny, *more: str):  # noqa: F811
    words = [*video_words(tiny), "--save_path=.", "--text_encoder_dtype=float32", "--prompt=x", *more]
    config = read_command(words, SCRIPT.build_parser(), SCRIPT.groups, lambda config: None)
    strategies, encoders = SCRIPT.strategies(config), SCRIPT.load_encoders(config)
    tokens = strategies.tokenize.tokenize("a red cat")
    with torch.no_grad():
        return strategies.encode(encoders, tokens)["llm"], encoders[0], tokens, strategies


def layer_by_layer(llama, ids: torch.Tensor, layers: int) -> torch.Tensor:
    """The state after so many layers, each called by itself."""
    length = ids.shape[1]
    x, places = llama.embed_tokens(ids), torch.arange(length)[None]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for layer in llama.layers[:layers]:
        x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=llama.rotary_emb(x, places))
        x = x[0] if isinstance(x, tuple) else x
    return x


@pytest.mark.parametrize(("skipped", "normed"), [(2, False), (0, False), (1, True), (0, True)])
def test_states_of_a_layer_with_or_without_the_last_norm(tiny, skipped, normed):  # noqa: F811
    more = ["--hidden_state_skip_layer", str(skipped), *(["--apply_final_norm"] if normed else [])]
    found, llama, (ids, mask, *_), strategies = encoded(tiny, *more)
    with torch.no_grad():
        states = layer_by_layer(llama, ids[:, : int(mask.sum())], len(llama.layers) - skipped)
        if normed or skipped == 0:
            size = (states.square().mean(-1, keepdim=True) + llama.norm.variance_epsilon).sqrt()
            states = states / size * llama.norm.weight
    expected = padded(states[:, strategies.tokenize.num_head :], TEXT_LENGTH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_usual_reading_is_that_of_the_options_left_out(tiny):  # noqa: F811
    assert HunyuanVideoModelOptions().hidden_layer == -3
    assert torch.equal(encoded(tiny)[0], encoded(tiny, "--hidden_state_skip_layer=2", "--reproduce")[0])


def test_each_part_of_the_refiner_has_its_factor(tiny):  # noqa: F811
    words = [*video_words(tiny), "--dit_dtype=float32", "--save_path=.", "--prompt=x"]

    def refiner(*more: str):
        config = read_command([*words, *more], SCRIPT.build_parser(), SCRIPT.groups, lambda config: None)
        return SCRIPT.load_placed(config, torch.float32, torch.device("cpu"), None).txt_in

    plain, scaled = refiner(), refiner("--te_multiplier", "1.5", "0.25")
    states = torch.randn(2, 6, plain.input_embedder.in_features, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        x = plain.input_embedder(states)
        vector = plain.t_embedder(times) + 0.25 * plain.c_embedder(states.mean(dim=1))
        for block in plain.individual_token_refiner.blocks:
            x = 1.5 * block(x, vector, None)
        torch.testing.assert_close(scaled(states, times, None), x, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain(states, times, None), x, atol=1e-3)


def test_scripts_take_them(tiny, framepack, tmp_path, caplog):  # noqa: F811
    guided = ["--guidance_scale=3"]
    ways = {
        "plain": guided, "not told": [*guided, "--disable_embedded_for_cfg"],
        "some": [*guided, "--disable_embedded_for_cfg", "--cfg_schedule=1"], "norm": [*guided, "--apply_final_norm"],
        "last": [*guided, "--hidden_state_skip_layer=0"], "factors": [*guided, "--te_multiplier", "1.2", "0.8"],
    }  # fmt: skip
    made = [latent(tiny, tmp_path / name, *words) for name, words in ways.items()]
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])
    assert "has no effect" not in caplog.text
    unguided = latent(tiny, tmp_path / "unguided")
    idle = ["--disable_embedded_for_cfg", "--te_multiplier", "1", "1"]
    assert torch.equal(unguided, latent(tiny, tmp_path / "idle", *idle))
    assert "--disable_embedded_for_cfg has no effect: no step" in caplog.text
    with pytest.raises(ConfigError, match="--hidden_state_skip_layer is 900; .* layers"):
        run(tiny, tmp_path / "x", "--hidden_state_skip_layer=900")
    one = ["--one_frame_inference=target_index=1"]
    sections = [framepack_latent(framepack, tmp_path / f"f{n}", *one, *more) for n, more in enumerate(
        ([], ["--te_multiplier", "1.2", "0.8"], ["--guidance_scale=2", "--perp_neg=1", "--cfg_schedule=1"])
    )]  # fmt: skip
    assert not torch.equal(sections[0], sections[1]) and not torch.equal(sections[0], sections[2])
