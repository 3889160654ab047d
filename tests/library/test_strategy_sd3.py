"""SD3: captions to tokens and conditioning, masks, no T5, what training leaves out, positions, the schedule."""

from __future__ import annotations

import pickle

import pytest
import torch

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.sd3_models import MMDiT
from library.sd3_train_utils import joined_context, random_corners, sample_schedule, without_dropped_parts
from library.sd3_utils import load_clip_g, load_clip_l, load_t5xxl
from library.strategy_sd3 import Sd3TextEncoderOutputsCachingStrategy, Sd3TextEncodingStrategy, Sd3TokenizeStrategy
from library.tiny_models.sd3_tiny import CLIP_G_WIDTH, CLIP_L_WIDTH, T5_WIDTH, TinySd3, build_tiny_sd3

TEXTS = ["a red cat", "photo of the blue dog", ""]
NAMES = TEXT_LAYOUTS["sd3"].names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd3:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"))


@pytest.fixture(scope="module")
def tokenize(tiny) -> Sd3TokenizeStrategy:
    folder = str(tiny.tokenizer)
    return Sd3TokenizeStrategy(20, clip_l_tokenizer=folder, clip_g_tokenizer=folder, t5xxl_path=str(tiny.t5xxl))


@pytest.fixture(scope="module")
def encoders(tiny) -> list[torch.nn.Module]:
    loads = ((load_clip_l, tiny.clip_l), (load_clip_g, tiny.clip_g), (load_t5xxl, tiny.t5xxl))
    return [load(path, torch.float32, "cpu") for load, path in loads]


def encoded(tokenize, encoders, texts=TEXTS, **settings) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = Sd3TextEncodingStrategy(**settings).encode_tokens(tokenize, encoders, tokenize.tokenize(texts))
    return TEXT_LAYOUTS["sd3"].named(outputs)


# -- tokens and states -------------------------------------------------------------------------------------------------


def test_tokens_and_their_padding(tokenize) -> None:
    l_ids, g_ids, t5_ids, *masks = tokenize.tokenize(TEXTS)
    assert l_ids.shape == g_ids.shape == (3, 77) and t5_ids.shape == (3, 20)
    eos = tokenize.clip_l.eos_token_id
    assert l_ids[0, 4:].tolist() == [eos] * 73 and g_ids[0, 4:].tolist() == [eos] + [0] * 72
    assert [mask.sum(1).tolist() for mask in masks] == [[5, 7, 2], [5, 7, 2], [4, 6, 1]]
    assert tokenize.overlong("red cat " * 60) and not tokenize.overlong(TEXTS[0])
    again = pickle.loads(pickle.dumps(tokenize)).tokenize(TEXTS)
    assert all(torch.equal(*pair) for pair in zip(again, tokenize.tokenize(TEXTS)))


def test_states_are_those_of_transformers(tokenize, encoders) -> None:
    """The last but one layer of both CLIPs side by side; pooled states through the projections; the last layer of
    T5."""
    found, (l_ids, g_ids, t5_ids, *_) = encoded(tokenize, encoders), tokenize.tokenize(TEXTS)
    with torch.no_grad():
        results = [model(ids, output_hidden_states=True) for model, ids in zip(encoders, (l_ids, g_ids))]
        t5 = encoders[2](t5_ids).last_hidden_state
    torch.testing.assert_close(found["lg_out"], torch.cat([r.hidden_states[-2] for r in results], dim=-1))
    torch.testing.assert_close(found["lg_pooled"], torch.cat([r.text_embeds for r in results], dim=-1))
    torch.testing.assert_close(found["t5_out"], t5)
    assert found["lg_out"].shape == (3, 77, CLIP_L_WIDTH + CLIP_G_WIDTH) and tuple(found) == NAMES


def test_each_mask_changes_its_own_encoder_and_a_mate_changes_nothing(tokenize, encoders) -> None:
    plain = encoded(tokenize, encoders)
    for flag, changed in (("apply_lg_attn_mask", {"lg_out"}), ("apply_t5_attn_mask", {"t5_out"})):
        masked = encoded(tokenize, encoders, **{flag: True})
        assert {name for name in NAMES if not torch.allclose(masked[name], plain[name], atol=1e-6)} == changed
    alone = encoded(tokenize, encoders, texts=TEXTS[1:2])
    assert all(torch.allclose(alone[name], plain[name][1:2], atol=1e-6) for name in NAMES)
    assert torch.equal(alone["lg_pooled"], plain["lg_pooled"][1:2])


def test_an_absent_encoder_leaves_its_keys_out(tokenize, encoders) -> None:
    masks = {"clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"}
    assert set(encoded(tokenize, [*encoders[:2], None])) == {"lg_out", "lg_pooled", *masks}
    assert set(encoded(tokenize, [None, None, encoders[2]])) == {"t5_out", *masks}


def test_without_t5_zeros_stand_in_its_place(tiny, encoders) -> None:
    folder = str(tiny.tokenizer)
    tokenize = Sd3TokenizeStrategy(256, clip_l_tokenizer=folder, clip_g_tokenizer=folder, has_t5=False)
    found = encoded(tokenize, [*encoders[:2], None], t5_width=T5_WIDTH)
    assert found["t5_out"].shape == (3, 77, T5_WIDTH) and not found["t5_out"].any()
    assert tokenize.overlong("red cat " * 60) and not tokenize.overlong(TEXTS[0])
    context = joined_context(found["lg_out"], found["t5_out"])
    assert context.shape == (3, 154, T5_WIDTH) and not context[:, 77:].any()
    assert not context[:, :77, CLIP_L_WIDTH + CLIP_G_WIDTH :].any() and context[:, :77].any()


def test_an_id_without_a_row_is_named(tokenize, encoders) -> None:
    tokens = tokenize.tokenize(TEXTS)
    tokens[1] = tokens[1] + 10**6
    with pytest.raises(ConfigError, match="CLIP-G"):
        Sd3TextEncodingStrategy().encode_tokens(tokenize, encoders, tokens)


def test_the_known_caching_class(tmp_path) -> None:
    caching = Sd3TextEncoderOutputsCachingStrategy(True, 1, False, is_partial=True, apply_t5_attn_mask=True)
    assert caching.get_outputs_npz_path("x/a.png") == "x/a_sd3_te.npz" and caching.is_partial
    assert caching.flags == {"apply_lg_attn_mask": False, "apply_t5_attn_mask": True}
    assert caching.live == {"lg_out", "lg_pooled"}


# -- what training varies ----------------------------------------------------------------------------------------------


def conditioning(batch: int) -> dict[str, torch.Tensor]:
    return {"lg_out": torch.ones(batch, 4, 10), "lg_pooled": torch.ones(batch, 10), "t5_out": torch.ones(batch, 5, 12)}


def test_each_encoder_of_each_sample_is_left_out_by_itself() -> None:
    draws = StepDraws(3, 7, tuple(range(600)))
    given = conditioning(600)
    found = without_dropped_parts(given, {"clip_l": 0.5, "clip_g": 0.25, "t5": 0.1}, 4, draws)
    first, second = found["lg_out"][..., :4], found["lg_out"][..., 4:]
    dropped = [~part.flatten(1).any(1) for part in (first, second, found["t5_out"])]
    assert all(abs(d.float().mean() - rate) < 0.06 for d, rate in zip(dropped, (0.5, 0.25, 0.1)))
    assert torch.equal(dropped[0], found["lg_pooled"][:, 0] == 0) and torch.equal(
        dropped[1], found["lg_pooled"][:, 9] == 0
    )
    for part, gone in zip((first, second, found["t5_out"]), dropped):
        assert (part[~gone] == 1).all()
    assert (dropped[0] & dropped[1]).any() and (dropped[0] & ~dropped[1]).any() and (~dropped[0] & dropped[1]).any()
    assert all((tensor == 1).all() for tensor in given.values()), "the given tensors may be those of a cache"


def test_the_draw_of_a_sample_hangs_on_its_place_alone() -> None:
    rates = {"clip_l": 0.5, "clip_g": 0.5, "t5": 0.5}
    whole = without_dropped_parts(conditioning(6), rates, 4, StepDraws(3, 7, range(6)))
    part = without_dropped_parts(conditioning(2), rates, 4, StepDraws(3, 7, (4, 5)))
    assert all(torch.equal(part[name], whole[name][4:]) for name in part)


def test_positions_are_moved_for_a_share_of_the_samples(tiny) -> None:
    with torch.device("meta"):
        model = MMDiT(tiny.params)  # a table of 24 x 24
    assert random_corners(model, (8, 12), 0.0, StepDraws(1, 1, range(4))) is None
    corners = random_corners(model, (8, 12), 0.5, StepDraws(1, 1, range(400)))
    middle = torch.tensor(model.middle_corner((4, 6)))
    moved = (corners != middle).any(1)
    assert abs(moved.float().mean() - 0.5) < 0.07
    assert corners.min(0).values.tolist() == [0, 0] and corners.max(0).values.tolist() == [20, 18]


def test_the_schedule_is_the_known_one() -> None:
    """Even times between those of the largest and the smallest sigma of the shifted table, shifted once more."""
    sigma = lambda t: 3 * (t / 1000) / (1 + 2 * (t / 1000))  # noqa: E731
    times = torch.linspace(1000.0, 1000 * sigma(1.0), 7, dtype=torch.float64)
    expected = [*(sigma(float(t)) for t in times), 0.0]
    torch.testing.assert_close(
        sample_schedule(7).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )
