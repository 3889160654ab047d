"""Names of the conditioning: which encoder makes which key, lists of plug-ins, and what is refused at the border."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import TrainingError
from library.dataset.collate import Sample, collate
from library.dataset.plan import BatchRequest
from library.dataset.text_cache_io import TEXT_LAYOUTS
from tests.library.dataset.small_family import SmallTextCaching, SmallTextEncoder, small_strategies

FLUX, SD3 = TEXT_LAYOUTS["flux"], TEXT_LAYOUTS["sd3"]


def flux_outputs() -> list[torch.Tensor]:
    return [torch.ones(2, 8), torch.ones(2, 5, 8), torch.zeros(2, 5, 3), torch.ones(2, 5, dtype=torch.int64)]


def test_what_an_encoder_makes_is_a_set_of_keys_for_any_number_of_encoders():
    assert FLUX.made_by([0]) == {"l_pooled"} and FLUX.made_by([1]) == {"t5_out"} and not FLUX.made_by([])
    assert SD3.made_by([0]) == SD3.made_by([1]) == {"lg_out", "lg_pooled"}
    assert SD3.made_by([1, 2]) == {"lg_out", "lg_pooled", "t5_out"}
    assert SD3.encoders_for({"lg_out"}) == {0, 1} and SD3.encoders_for({"t5_attn_mask"}) == set()


def test_lists_of_plug_ins_are_named_and_listed_again():
    outputs = flux_outputs()
    named = FLUX.named(outputs)
    assert list(named) == ["l_pooled", "t5_out", "txt_ids", "t5_attn_mask"]
    assert all(a is b for a, b in zip(FLUX.listed(named), outputs))
    partial = FLUX.named([None, *outputs[1:]])
    assert "l_pooled" not in partial and FLUX.listed(partial)[0] is None
    given = [torch.ones(2, 5, 8), torch.ones(2, 5), torch.ones(2, 6), torch.ones(2, 6)]
    assert list(TEXT_LAYOUTS["anima"].named(given)) == ["prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda outputs: outputs[:3], "Own gave 3 outputs; needed: 4, l_pooled, t5_out, txt_ids, t5_attn_mask"),
        (
            lambda outputs: [outputs[0][0], *outputs[1:]],
            r"Own gave l_pooled of shape \[8\]; needed: 2 dimensions, the batch first",
        ),
        (
            lambda outputs: [outputs[0], outputs[1].long(), *outputs[2:]],
            "Own gave t5_out as int64; needed: floating-point numbers",
        ),
    ],
)
def test_what_is_not_the_conditioning_of_the_family_is_refused(change, words):
    with pytest.raises(TrainingError, match=words):
        FLUX.named(change(flux_outputs()), "Own")


def test_unknown_and_missing_keys_are_named():
    named = FLUX.named(flux_outputs())
    with pytest.raises(TrainingError, match="Own gave pooled; the conditioning has l_pooled"):
        FLUX.check({"pooled": named["l_pooled"]}, "Own")
    del named["t5_out"]
    with pytest.raises(TrainingError, match="Own gave no t5_out"):
        FLUX.check_complete(named, "Own")


def test_the_keys_of_a_cache_are_those_of_encoders_that_do_not_learn():
    strategy, encoder = SmallTextCaching(False), SmallTextEncoder()
    strategies = small_strategies(text=strategy)
    for trained, cached in (
        ([True, False], ["t5_out", "txt_ids", "t5_attn_mask"]),
        ([False, True], ["l_pooled", "txt_ids", "t5_attn_mask"]),
    ):
        strategy.trained = trained
        assert list(strategy.encode(strategies, [encoder, encoder], ["a cat"])) == cached
    strategy.trained = []
    assert not strategy.is_partial


def test_plug_ins_read_the_list_of_a_batch():
    request = BatchRequest(
        dataset=0, items=(0, 1), positions=(0, 1), epoch=1, step=0, index=0, group_size=2, is_last_of_group=True,
        is_last_of_epoch=True
    )
    outputs = {"t5_out": torch.ones(5, 8), "l_pooled": torch.zeros(8)}
    samples = [
        Sample("a", "", outputs, 1.0, (8, 8), (0, 0), (8, 8), False),
        Sample("b", "", dict(outputs), 1.0, (8, 8), (0, 0), (8, 8), False)
    ]
    batch = collate(request, samples, None, conditioning_keys=FLUX.names)
    pooled, states, ids, mask = batch["text_encoder_outputs_list"]
    assert pooled is batch.conditioning["l_pooled"] and states.shape == (2, 5, 8) and ids is mask is None
    assert "text_encoder_outputs_list" in list(batch.keys()) and batch.get("text_encoder_outputs_list")[0] is pooled
    assert len(batch.rows([1]).text_encoder_outputs_list[1]) == 1
