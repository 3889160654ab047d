"""The text encoder cache: captions, several of them in one file, stale files, the empty caption, partial caches."""

from __future__ import annotations

import dataclasses
import logging
import os

import numpy as np
import pytest
import torch
from torch import nn

from library.core.errors import ConfigError, TrainingError
from library.dataset.captions import deterministic_caption
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.npz_file import read_arrays, write_arrays
from library.dataset.text_caching import empty_caption_item, encode_text, finish_text, plan_text
from library.strategy_base import TextEncoderOutputsCachingStrategy
from tests.library.dataset.images import make_folder, make_image, make_item
from tests.library.dataset.small_family import SmallTextCaching, SmallTextEncoder, small_strategies


def fill(
    items: list[ImageItem],
    strategy: TextEncoderOutputsCachingStrategy | None = None,
    encoder: nn.Module | None = None,
    **division,
) -> list[str]:
    """Cache what is missing; the captions that were encoded."""
    strategy, encoder = strategy or SmallTextCaching(True), encoder or SmallTextEncoder()
    plan = plan_text(items, strategy, **division)
    encode_text(plan, small_strategies(text=strategy), [encoder, encoder], show_progress=False)
    return [job.caption for job in plan.jobs]


def outputs(item: ImageItem, strategy: TextEncoderOutputsCachingStrategy | None = None) -> dict[str, torch.Tensor]:
    return (strategy or SmallTextCaching(True)).outputs_of(item)


@pytest.fixture
def item(tmp_path) -> ImageItem:
    return make_item(make_image(tmp_path / "a.png"), caption="a red cat")


def test_a_second_run_encodes_nothing_and_reads_the_same(item):
    assert fill([item]) == ["a red cat"]
    first = outputs(item)
    again = dataclasses.replace(item, text_encoder_outputs_npz=None)
    assert fill([again]) == []
    assert all(torch.equal(tensor, outputs(again)[name]) for name, tensor in first.items())


def test_memory_and_disk_hold_the_same(item):
    fill([item])
    in_memory = dataclasses.replace(item, text_encoder_outputs_npz=None)
    fill([in_memory], SmallTextCaching(False))
    assert outputs(item).keys() == outputs(in_memory).keys()
    for a, b in zip(outputs(item).values(), outputs(in_memory).values()):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_an_edited_caption_is_encoded_again_and_the_old_one_goes(item):
    fill([item])
    edited = dataclasses.replace(item, caption="a blue dog")
    assert fill([edited]) == ["a blue dog"]
    assert {key for key in read_arrays(item.text_encoder_outputs_npz) if key.startswith("t5_out")} == {"t5_out"}
    assert fill([edited]) == []


def test_two_captions_of_one_image_lie_side_by_side(item):
    other = dataclasses.replace(item, subset=dataclasses.replace(item.subset, caption_prefix="sks"))
    assert fill([item, other]) == ["a red cat", "sks a red cat"]
    keys = sorted(key for key in read_arrays(item.text_encoder_outputs_npz) if key.startswith("l_pooled"))
    assert keys[0] == "l_pooled" and len(keys) == 2 and keys[1] == "l_pooled" + other.text_encoder_outputs_suffix
    assert len(other.text_encoder_outputs_suffix) == 9
    assert not torch.equal(outputs(item)["l_pooled"], outputs(other)["l_pooled"])
    assert fill([other, item]) == []
    assert outputs(item)["l_pooled"].shape == (8,)
    # editing one of them leaves the other alone
    edited = dataclasses.replace(item, caption="a blue dog")
    other.caption = "a red cat"
    assert fill([edited, other]) == ["a blue dog"]
    assert fill([edited, other]) == []
    assert len([key for key in read_arrays(item.text_encoder_outputs_npz) if key.startswith("l_pooled")]) == 2


def test_equal_captions_are_encoded_once(tmp_path):
    items = make_folder(tmp_path, 4)
    for entry in items:
        entry.caption = "sks cat"
    encoder = SmallTextEncoder()
    assert fill(items, encoder=encoder) == ["sks cat"]
    assert len(list(tmp_path.glob("*_flux_te.npz"))) == 4


def test_settings_of_the_encoders_make_a_cache_stale(item):
    strategy = SmallTextCaching(True)
    strategy.model_identity, strategy.settings = "one", {"system_prompt": "none", "gemma2_max_token_length": "9"}
    fill([item], strategy)

    def why(**changes) -> str:
        other = SmallTextCaching(True, mask=changes.pop("mask", False))
        other.model_identity = "one"
        for name, value in changes.items():
            setattr(other, name, value)
        return other.find(item.text_encoder_outputs_npz, "a red cat")[1]

    assert why() == ""
    assert why(model_identity="two") == "made with other text encoders"
    same, other = {"system_prompt": "none"}, {"system_prompt": "another"}
    assert why(settings=same) == why(settings={"of_another_version": "1"}) == ""  # what the file does not tell
    assert why(settings=other, model_identity="two") == "made with another system_prompt"
    assert why(settings=same, model_identity="two") == "made with other text encoders"
    assert why(mask=True) == "made with another apply_t5_attn_mask"
    assert why(max_token_length=24) == "t5_out has 12 tokens, 24 are needed"
    assert why(is_weighted=True) == "made with another weighted_captions"


def test_a_file_of_another_trainer_serves_an_image_with_one_caption_only(item):
    strategy = SmallTextCaching(True)
    fill([item])
    plain = {
        key: array for key, array in read_arrays(item.text_encoder_outputs_npz).items() if not key.startswith("atelier")
    }
    write_arrays(item.text_encoder_outputs_npz, plain)
    assert fill([dataclasses.replace(item, caption="whatever it was")]) == []
    other = dataclasses.replace(item, caption="another")
    assert fill([item, other], strategy) == ["a red cat", "another"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip"])
def test_a_damaged_file_is_made_again(item, content, caplog):
    fill([item])
    open(item.text_encoder_outputs_npz, "wb").write(content)
    assert fill([item]) == ["a red cat"] and "cannot be read" in caplog.text


def test_a_damaged_file_of_several_clips_is_told_once(item, caplog):
    fill([item])
    open(item.text_encoder_outputs_npz, "wb").write(b"")
    clips = [dataclasses.replace(item, image_key=f"{n}") for n in range(3)]
    assert fill(clips) == ["a red cat"] and caplog.text.count("cannot be read") == 1


def test_what_is_encoded_is_the_caption_without_its_random_parts(tmp_path):
    subset = SubsetParams(
        caption_prefix="photo of", caption_suffix="end", keep_tokens_separator="|||", secondary_separator=";;;",
        caption_dropout_rate=0.5
    )
    item = make_item(make_image(tmp_path / "a.png"), caption="a ||| b;;;c\nsecond line", subset=subset)
    assert fill([item]) == [deterministic_caption(item.caption, subset)]
    assert "second" not in deterministic_caption(item.caption, subset)


@pytest.mark.parametrize(
    "setting",
    [{"shuffle_caption": True}, {"token_warmup_step": 5}, {"caption_tag_dropout_rate": 0.1}, {"enable_wildcard": True}]
)
def test_random_captions_are_refused(item, setting):
    (name,) = setting
    item.subset = SubsetParams(label="datasets[1].subsets[0]", **setting)
    with pytest.raises(ConfigError, match=rf"datasets\[1\].subsets\[0\].{name} is"):
        plan_text([item], SmallTextCaching(True))


def test_the_empty_caption_is_cached_only_where_captions_may_be_dropped(tmp_path, item):
    assert empty_caption_item([item]) is None
    dropping = [dataclasses.replace(item, subset=SubsetParams(caption_dropout_rate=0.1)), item]
    empty = empty_caption_item(dropping)
    assert sorted(fill([*dropping, empty])) == ["", "a red cat"]
    assert (tmp_path / "_empty_caption_flux_te.npz").exists()
    assert fill([*dropping, empty_caption_item(dropping)]) == []
    assert outputs(empty)["t5_attn_mask"].sum() == 0


def test_a_partial_cache_holds_only_what_is_needed(item):
    partial = SmallTextCaching(True, is_partial=True)
    plan = plan_text([item], partial)
    encode_text(plan, small_strategies(text=partial), [SmallTextEncoder(), SmallTextEncoder()], show_progress=False)
    assert "l_pooled" not in read_arrays(item.text_encoder_outputs_npz)
    assert list(outputs(item, partial)) == ["t5_out", "txt_ids", "t5_attn_mask"]
    assert fill([item]) == ["a red cat"], "a full cache needs the pooled state too"
    assert plan_text([item], partial).jobs == [], "a full cache serves a partial one"
    assert "l_pooled" not in outputs(item, partial)


def test_outputs_that_are_not_finite_are_named(item):
    encoder = SmallTextEncoder()
    encoder.embedding.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="l_pooled of the caption of .*a.png is not finite"):
        fill([item], encoder=encoder)
    assert not os.path.exists(item.text_encoder_outputs_npz)


def test_half_precision_outputs(item):
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        fill([item], encoder=SmallTextEncoder().to(dtype))
        kinds = [output.dtype for output in outputs(item).values()]
        assert kinds == [stored, stored, torch.float32, torch.int64]
        os.remove(item.text_encoder_outputs_npz)


def test_files_are_divided_among_processes(tmp_path):
    items = make_folder(tmp_path, 5)
    assert len(fill(items, process_index=0, num_processes=2)) == 3
    with pytest.raises(TrainingError, match="2 captions have no cached"):
        finish_text(items, SmallTextCaching(True))
    assert len(fill(items, process_index=1, num_processes=2)) == 2
    finish_text(items, SmallTextCaching(True))


def test_overlong_captions_are_counted_in_one_warning(tmp_path, caplog):
    items = make_folder(tmp_path, 3)
    for number, entry in enumerate(items):
        entry.caption = " ".join(["word"] * (5 + 10 * number))
    with caplog.at_level(logging.WARNING):
        fill(items)
    assert [record.message for record in caplog.records] and "2 of 3 captions are longer" in caplog.text


def test_the_old_entry_point_for_plug_ins(item):
    strategy, encoder = SmallTextCaching(True), SmallTextEncoder()
    strategies = small_strategies(text=strategy)
    strategy.cache_batch_outputs(strategies.tokenize, [encoder, encoder], strategies.text_encoding, [item])
    assert strategy.is_disk_cached_outputs_expected(item.text_encoder_outputs_npz)
    loaded = strategy.load_outputs_npz(item.text_encoder_outputs_npz)
    assert [type(array) for array in loaded] == [np.ndarray] * 4
