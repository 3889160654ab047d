"""From prompt lines to requests: seeds, sizes, batches, stages."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.core.options import Config
from library.core.text_seeds import string_to_seed
from library.generation.gen_img.options import (
    GENERATION_CLASSES,
    GenerationNetworkOptions,
    GenerationPictureOptions,
    GenerationShrinkOptions,
)
from library.generation.gen_img.plan import Planner, PromptLine, batches, first_stage, round_of


def planner(*, default_size: int = 512, sources=(), is_alone: bool = False, **values) -> Planner:
    return Planner(
        Config.read(values, GENERATION_CLASSES), default_size=default_size, source_sizes=sources, is_alone=is_alone
    )


def line(text: str) -> PromptLine:
    return PromptLine(text, "prompts.txt line 3")


def requests(plan: Planner, text: str, round_number: int = 0) -> list:
    return list(plan.requests(line(text), round_number))


def test_what_a_line_leaves_open_comes_from_the_options():
    [request] = requests(
        planner(steps=20, scale=5.0, negative_scale=1.5, H=256, seed=4, is_alone=True), "a cat --w 320 --s 9 --nl none"
    )
    assert (request.width, request.height, request.steps, request.scale, request.negative_scale) == (
        320,
        256,
        9,
        5.0,
        None,
    )
    assert request.seed == 4 and request.sizes == request.sizes_negative == (256, 320, 0, 0)


def test_an_explicit_0_is_a_value():
    [request] = requests(planner(scale=5.0, strength=0.5), "a --l 0 --t 0")
    assert request.scale == 0 and request.strength == 0


def test_sizes_for_the_negative_prompt_follow_unless_given():
    [request] = requests(planner(original_height=900, crop_left=7), "a --nw 300")
    assert request.sizes == (900, 512, 0, 7) and request.sizes_negative == (900, 300, 0, 7)


def test_seeds_of_a_line_win_and_the_last_one_repeats():
    plan = planner(seed=3, images_per_prompt=3)
    assert [r.seed for r in requests(plan, "a --d 7,8")] == [7, 8, 8]
    assert [r.seed for r in requests(plan, "{a|b} --d 9")] == [9, 9, 9]
    assert [r.seed for r in requests(plan, "{a|b} --d cat, 7 --s 3")] == [2933283709, 7, 7]
    assert [r.seed for r in requests(plan, "{a|b} --d red cat")] == [string_to_seed("red cat")] * 3


def test_drawn_seeds_are_functions_of_seed_and_number():
    first, second = planner(seed=3, images_per_prompt=2), planner(seed=3, images_per_prompt=2)
    seeds = [r.seed for text in ("a", "b") for r in requests(first, text)]
    assert seeds == [r.seed for text in ("c", "d") for r in requests(second, text)] and len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds != [r.seed for text in ("a", "b") for r in requests(planner(seed=4, images_per_prompt=2), text)]


def test_one_seed_for_all_prompts_of_a_round():
    plan = planner(seed=3, iter_same_seed=True)
    [a], [b], [c] = requests(plan, "a", 0), requests(plan, "b", 0), requests(plan, "a", 1)
    assert a.seed == b.seed != c.seed


def test_combinations_have_the_first_seed():
    found = requests(planner(seed=3), "a {e$$x|y} {e$$1|2}")
    assert [r.prompt for r in found] == ["a x 1", "a x 2", "a y 1", "a y 2"] and len({r.seed for r in found}) == 1
    assert [r.number for r in found] == [0, 1, 2, 3]


def test_sources_take_turns_and_give_the_size():
    plan = planner(sources=[(100, 70), (640, 480)])
    found = [requests(plan, "a")[0] for _ in range(3)]
    assert [(r.source, r.width, r.height) for r in found] == [(0, 96, 64), (1, 640, 480), (0, 96, 64)]
    [given] = requests(planner(sources=[(100, 70)], W=128), "a")
    assert (given.width, given.height) == (128, 64)
    [highres] = requests(planner(sources=[(100, 70)], highres_fix_scale=0.5), "a")
    assert (highres.width, highres.height) == (512, 512)


def test_a_prompt_that_came_from_a_picture_stays_with_it():
    plan = planner(sources=[(100, 70), (640, 480)], images_per_prompt=3)
    found = list(plan.requests(PromptLine("a", "one.png", 1), 0))
    assert [(r.source, r.width, r.number) for r in found] == [(1, 640, 0), (1, 640, 1), (1, 640, 2)]


def test_combinations_take_the_pictures_in_turn():
    found = requests(planner(sources=[(100, 70), (640, 480)]), "{e$$a|b|c}")
    assert [(r.source, r.width) for r in found] == [(0, 96), (1, 640), (0, 96)]


def test_only_equal_settings_share_a_batch():
    plan = planner(seed=1)
    found = [
        r for text in ("a", "b --d 5 --n x", "c --l 3", "d --l 3 --f name", "e --l 3") for r in requests(plan, text)
    ]
    assert [[r.prompt for r in batch] for batch in batches(found, 2)] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_full_batch_does_not_wait_for_the_next_request():
    plan = planner(seed=1)

    def asked():
        yield from requests(plan, "a")
        raise AssertionError("asked for another request first")

    assert [r.prompt for r in next(batches(asked(), 1))] == ["a"]


def test_rounds_are_shuffled_by_the_seed():
    from library.generation.gen_img.options import GenerationPromptOptions

    lines = [line(str(number)) for number in range(20)]
    assert round_of(lines, GenerationPromptOptions(), 1, 0) == lines
    shuffled = GenerationPromptOptions(shuffle_prompts=True)
    assert round_of(lines, shuffled, 1, 0) == round_of(lines, shuffled, 1, 0) != round_of(lines, shuffled, 1, 1)


def test_the_first_stage_is_small_and_its_sizes_follow():
    [request] = requests(
        planner(highres_fix_scale=0.5, strength=0.6, highres_fix_strength=0.3), "a --w 520 --h 768 --nw 99"
    )
    small = first_stage(request, 0.5, 28)
    assert (small.width, small.height, small.steps, small.strength, request.strength) == (256, 384, 28, 0.3, 0.6)
    assert small.sizes == (384, 256, 0, 0) and small.sizes_negative == (768, 99, 0, 0)
    with pytest.raises(ConfigError, match="would begin at 0x0"):
        first_stage(requests(planner(), "a --w 64 --h 64")[0], 0.4, 28)


def test_deep_shrink_and_gradual_latent_of_line_and_options():
    [request] = requests(planner(ds_depth_1=2, ds_ratio=0.25), "a --dst1 500")
    assert (request.deep_shrink.depth_1, request.deep_shrink.timesteps_1, request.deep_shrink.ratio) == (2, 500, 0.25)
    [request] = requests(
        planner(sampler="k_euler_a", gradual_latent_unsharp_params="3,0.5,0.5,1"), "a --glt 700 --glr 0.75"
    )
    assert request.gradual_latent.ratio == 0.75 and request.gradual_latent.unsharp == (3.0, 0.5, 0.5, 1.0)
    with pytest.raises(ConfigError, match="prompts.txt line 3: gradual latent works with"):
        requests(planner(), "a --glt 700")


@pytest.mark.parametrize("name", ["/x.png", "../x.png", "a/../../x", "C:\\x.png"])
def test_file_names_stay_in_the_folder(name):
    with pytest.raises(ConfigError, match="a name inside --outdir is needed"):
        requests(planner(), f"a --f {name}")


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (GenerationPictureOptions, {"noise_offset_range": [0.3, 0.1]}, "the least value, then the largest"),
        (GenerationPictureOptions, {"steps": 1001}, "the noise schedule has 1000"),
        (GenerationShrinkOptions, {"gradual_latent_unsharp_params": "2,1,1,1"}, "an odd kernel size"),
        (GenerationShrinkOptions, {"ds_depth_2": 1}, "without --ds_depth_1"),
        (GenerationNetworkOptions, {"network_weights": ["a"]}, "--network_module has 0 values for 1 files"),
        (GenerationNetworkOptions, {"network_merge_n_models": 1}, "there are 0 networks"),
    ],
)
def test_options_that_do_not_fit_are_told(group, values, message):
    with pytest.raises(ConfigError, match=message):
        group(**values)
