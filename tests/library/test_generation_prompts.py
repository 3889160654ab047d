"""Prompt lines of the generation script: every option, lists, ranges and errors with line numbers."""

from __future__ import annotations

import dataclasses

import pytest

from library.core.errors import ConfigError
from library.generation.gen_img.prompts import (
    GENERATION_LINE_OPTIONS,
    GenerationPrompt,
    parse_generation_line,
    parse_generation_lines,
)
from library.training.sampling_prompts import IMAGE_LINE_OPTIONS, parse_line


def given(line: str) -> dict:
    prompt = dataclasses.asdict(parse_generation_line(line))
    return {key: value for key, value in prompt.items() if value is not None}


@pytest.mark.parametrize(
    ("piece", "field", "value"),
    [
        ("w 640", "width", 640), ("H 512", "height", 512), ("s 40", "sample_steps", 40), ("s 0", "sample_steps", 1),
        ("s 5000", "sample_steps", 1000), ("d 7", "seeds", (7,)), ("d 1, 2,3", "seeds", (1, 2, 3)),
        ("t 0.6", "strength", 0.6),
        ("n a, b-c", "negative_prompt", "a, b-c"), ("c other", "clip_prompt", "other"), ("l 7.5", "scale", 7.5),
        ("nl 3", "negative_scale", 3.0), ("nl None", "negative_scale", "none"),
        ("am 0.5,-1", "network_multipliers", (0.5, -1.0)),
        ("f cat.png", "file_name", "cat.png"), ("ow 1", "original_width", 1), ("oh 2", "original_height", 2),
        ("nw 3", "original_width_negative", 3), ("nh 4", "original_height_negative", 4), ("ct 0", "crop_top", 0),
        ("cl 8", "crop_left", 8), ("dsd1 3", "deep_shrink_depth_1", 3), ("dst1 650", "deep_shrink_timesteps_1", 650),
        ("dsd2 2", "deep_shrink_depth_2", 2), ("dst2 600", "deep_shrink_timesteps_2", 600),
        ("dsr 0.5", "deep_shrink_ratio", 0.5),
        ("glt 750", "gradual_latent_timesteps", 750), ("glr 0.5", "gradual_latent_ratio", 0.5),
        ("gle 3", "gradual_latent_every_n_steps", 3), ("gls 0.125", "gradual_latent_ratio_step", 0.125),
        ("glsn 1.0", "gradual_latent_s_noise", 1.0),
        ("glus 3,0.5,0.5,1", "gradual_latent_unsharp", (3.0, 0.5, 0.5, 1.0)),
    ],
)  # fmt: skip
def test_every_option(piece, field, value):
    assert given(f"a cat --{piece}") == {"prompt": "a cat", field: value}


def test_every_option_fills_a_field_of_its_own():
    fields = [option.field for option in GENERATION_LINE_OPTIONS.values()]
    assert sorted(fields) == sorted(
        field.name for field in dataclasses.fields(GenerationPrompt) if field.name != "prompt"
    )


def test_the_first_piece_is_the_prompt_whatever_it_says():
    assert given("--w 512 --h 256") == {"prompt": "--w 512", "height": 256}


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("w 0", "--w is '0'; 1 or more"), ("w 5.5", "a whole number"), ("d 1,", "a number or a text"),
        ("d 4294967296", "at most 4294967295"),
        ("t 1.5", "from 0 to 1"), ("nl no", "a number is needed"), ("am 1,,2", "a number is needed"),
        ("glr 0", "above 0"),
        ("glus 4,1,1,0", "odd kernel size"), ("glus 3,1,1", "odd kernel size"), ("glus 3,1,1,2", "odd kernel size"),
        ("q 1", "unknown option --q"),
        ("l", "--l has no value"),
    ],
)  # fmt: skip
def test_mistakes_are_told(piece, message):
    with pytest.raises(ConfigError) as error:
        parse_generation_line(f"a --{piece}")
    assert message in str(error.value)


def test_all_mistakes_of_a_file_are_told_with_their_lines():
    content = "# a comment\na cat --w 512\n\na dog --w x\n # text --l y\n"
    with pytest.raises(ConfigError) as error:
        parse_generation_lines(content, "p.txt")
    assert "p.txt line 4: --w" in str(error.value) and "p.txt line 5: --l" in str(error.value)
    assert [prompt.prompt for prompt in parse_generation_lines("# c\n\na\nb\n", "p.txt")] == ["a", "b"]


def test_the_last_seed_of_a_list_repeats():
    prompt = parse_generation_line("a --d 4,5")
    assert [prompt.seed_of(image) for image in range(4)] == [4, 5, 5, 5]
    assert parse_generation_line("a").seed_of(0) is None


def test_multipliers_are_one_per_network():
    assert parse_generation_line("a").multipliers_of(2, [1.0, 0.5]) == (1.0, 0.5)
    assert parse_generation_line("a --am 0.2,0.3").multipliers_of(2, [1.0, 1.0]) == (0.2, 0.3)
    with pytest.raises(ConfigError, match="has 1 multipliers .* for 2 networks"):
        parse_generation_line("a --am 0.2").multipliers_of(2, [1.0, 1.0])


def test_prompts_of_training_have_no_options_of_this_script():
    assert not {"am", "nl", "dsd1", "glt"} & set(IMAGE_LINE_OPTIONS)
    with pytest.raises(ConfigError, match="unknown option --am"):
        parse_line("a --am 1")
