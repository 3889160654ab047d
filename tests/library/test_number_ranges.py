"""Numbers that no run can use are refused at start: options of every script, keys of the dataset configuration, prompt
lines, network arguments."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest
from voluptuous import Invalid

from library.core.errors import ConfigError
from library.core.options import Config, allows_none, is_bool_option, option_fields, value_type
from library.dataset.config_schema import KEYS
from library.families.registry import FAMILIES
from library.generation import (
    anima_inference,
    flux_inference,
    framepack_inference,
    hunyuan_image_inference,
    hunyuan_video_inference,
    lumina_inference,
    sd3_inference,
    sdxl_inference,
    wan_inference,
)
from library.generation.gen_img import options as generation_options
from library.generation.gen_img.prompts import GENERATION_LINE_OPTIONS, parse_generation_line
from library.generation.lumina_options import LuminaPromptOptions
from library.training import parser_common
from library.training.computing_options import DdpOptions
from library.training.option_groups import LoopOptions
from library.training.sampling_prompts import (
    IMAGE_LINE_OPTIONS,
    VIDEO_LINE_OPTIONS,
    Whole,
    load_prompts,
    parse_line,
    parse_pieces,
    read_number,
)
from networks.kinds.network_args import argument_parsers
from networks.kinds.targets import targets_of_family
from tests.runs.conftest import Work
from tests.runs.families import refused_run

HUGE = 10**40
PICTURE_SCRIPTS = (
    anima_inference, flux_inference, framepack_inference, hunyuan_image_inference, hunyuan_video_inference,
    lumina_inference, sd3_inference, sdxl_inference, wan_inference,
)  # fmt: skip


def option_classes() -> list[type]:
    scripts = [parser_common.script(family, "network").classes for family in FAMILIES]
    scripts += [script.GROUPS for script in PICTURE_SCRIPTS]
    scripts += [
        [c for c in vars(generation_options).values() if isinstance(c, type) and c.__name__.endswith("Options")]
    ]
    return list(dict.fromkeys(c for classes in scripts for c in classes))


def numeric_options() -> list[tuple[type, str]]:
    return [
        (c, name) for c in option_classes() for name in option_fields(c)
        if value_type(c, name) in (int, float) and not is_bool_option(c, name)
    ]


def wrapped(options_class: type, name: str, number: float) -> object:
    """A list for options of several values."""
    nargs = option_fields(options_class)[name][1].nargs
    return (
        (number,) * nargs
        if isinstance(nargs, int)
        else [number]
        if nargs
        else (number, 64)
        if name in ("resolution", "skip_image_resolution", "face_crop_aug_range", "show_timesteps_resolution")
        else number
    )


@pytest.mark.parametrize(
    ("options_class", "name"), numeric_options(), ids=lambda value: getattr(value, "__name__", value)
)
def test_every_numeric_option_has_bounds(options_class: type, name: str) -> None:
    bad = [HUGE, -HUGE] if value_type(options_class, name) is int else [math.inf, -math.inf, math.nan, 1e39, HUGE]
    for number in bad:
        with pytest.raises(ConfigError) as error:
            Config.read({name: wrapped(options_class, name, number)}, [options_class])
        assert any(f"--{name} " in message for message in error.value.problems), error.value.problems
    assert allows_none(options_class, name) or option_fields(options_class)[name][0].default is not None


SHARE = re.compile(r"ratio|dropout|discount|split$|quantile|strength|_rate$|top_p|thresh")
NO_SHARE = {
    "learning_rate": "a rate of learning", "save_n_epoch_ratio": "how many files", "split_unit": "a rank",
    "noise_offset_random_strength": "a switch", "magcache_threshold": "an error that adds up",
    "rope_scaling_timestep_threshold": "a timestep", "weight_cap_ratio": "how many times as much",
}  # fmt: skip
"""names that are like those of shares -> what they are"""


def test_shares_are_from_0_to_1() -> None:
    shares = [
        (options_class, name) for options_class, name in numeric_options()
        if SHARE.search(name) and name not in NO_SHARE and value_type(options_class, name) is float
        and option_fields(options_class)[name][1].status == "works"
    ]  # fmt: skip
    assert len(shares) > 12
    for options_class, name in shares:
        for number in (-0.5, 1.5):
            with pytest.raises(ConfigError, match=f"--{name} is .*(0 or more|from 0|above 0)"):
                Config.read({name: wrapped(options_class, name, number)}, [options_class])


@pytest.mark.parametrize(("letter", "wrong", "needed"), [
    ("ctr", "2", "from 0 to 1"), ("rcfg", "-1", "0 or more"), ("fs", "0", "a number above 0"),
    ("g", "-3", "0 or more"),
])  # fmt: skip
def test_ranges_of_sample_prompts(letter: str, wrong: str, needed: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{letter} is '{wrong}'; .*{needed} is needed"):
        parse_line(f"a cat --{letter} {wrong}")
    field = IMAGE_LINE_OPTIONS[letter].field
    (tmp_path / "prompts.json").write_text(f'[{{"prompt": "a cat", "{field}": {wrong}}}]')
    with pytest.raises(ConfigError, match=f"{field} is {wrong}; .*{needed} is needed"):
        load_prompts(tmp_path / "prompts.json")


def test_messages_say_what_is_possible() -> None:
    with pytest.raises(ConfigError, match="--cfg_trunc_ratio is 2.0; needed: a number from 0 to 1"):
        Config.read({"cfg_trunc_ratio": 2.0}, [LuminaPromptOptions])
    with pytest.raises(ConfigError, match=r"--ddp_timeout is 99999999999; needed: a whole number of at most 525600"):
        Config.read({"ddp_timeout": 99999999999}, [DdpOptions])
    with pytest.raises(ConfigError, match=r"--max_train_steps is 1000000\d*\.\.\. \(41 characters\)"):
        Config.read({"max_train_steps": HUGE}, [LoopOptions])
    assert Config.read({"seed": 2**64 - 1}, [LoopOptions])[LoopOptions].seed == 2**64 - 1


@pytest.mark.parametrize("name", KEYS)
def test_every_numeric_key_of_a_dataset_has_bounds(name: str) -> None:
    key = KEYS[name]
    for number in (HUGE, math.inf, -math.inf, math.nan, 1e39):
        for value in (number, [number, number], [1.0, number]):
            with pytest.raises(Invalid):
                key.check(value)


def test_a_multiplier_of_zero_is_refused_with_the_reason() -> None:
    with pytest.raises(Invalid, match="nothing to learn"):
        KEYS["network_multiplier"].check(0.0)
    assert KEYS["network_multiplier"].check(-1) == -1


LINES = {
    "samples": IMAGE_LINE_OPTIONS, "video samples": VIDEO_LINE_OPTIONS, "gen_img": GENERATION_LINE_OPTIONS,
    "flux": flux_inference.LINE_OPTIONS,
    "sdxl": sdxl_inference.LINE_OPTIONS, "anima": anima_inference.LINE_OPTIONS,
    "lumina": lumina_inference.LINE_OPTIONS,
}  # fmt: skip
TEXTS = {
    "negative_prompt",
    "clip_prompt",
    "file_name",
    "prompt2",
    "sample_sampler", "sigma_table",
    "controlnet_image",
    "image_path",
    "end_image_path",
}
TEXTS |= {"cfg_schedule", "control_image_path", "control_video_path", "one_frame"}


@pytest.mark.parametrize("script", LINES)
def test_every_number_of_a_prompt_line_has_bounds(script: str) -> None:
    for letter, option in LINES[script].items():
        if option.field in TEXTS or option.ignored:
            continue
        for text in ("9" * 40, "9" * 9999, "1e400", "1" + "0" * 39):
            try:
                value = parse_pieces(f"a cat --{letter} {text}", "line", LINES[script])[1][option.field]
            except ConfigError as error:
                assert f"--{letter}" in error.problems[0]
            else:  # the steps of a sample are brought into their range; what is no number is a seed as well
                is_text_seed = option.field in ("seed", "seeds") and not text.isdigit()
                assert is_text_seed or (option.field == "sample_steps" and value == 1000), (letter, value)


def test_sizes_beyond_any_picture_are_refused() -> None:
    with pytest.raises(ConfigError, match="--w is '99999999968'; at most 16384 is possible"):
        parse_line("a cat --w 99999999968")
    with pytest.raises(ConfigError, match="at most 16384"):
        parse_generation_line("a cat --h 20000")
    assert isinstance(Whole(), Whole) and read_number("-1e-3") == -0.001


def test_keys_of_prompt_files_have_the_same_bounds(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text("[prompt]\nwidth = 99999999968\n[[prompt.subset]]\nprompt = 'a'\nscale = inf\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"width is 99999999968; at most 16384[\s\S]*scale is inf; a finite number"):
        load_prompts(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_network_argument_has_bounds(family: str) -> None:
    for name, parse in argument_parsers(targets_of_family(family)).items():
        for text in ("1e400", "9" * 40, "nan"):
            for value in (text, ",".join([text] * 40)):
                try:
                    found = parse(value)
                except ValueError:
                    continue
                except Exception as error:  # a truth value has its own error
                    assert "truth value" in str(error)
                    continue
                assert not isinstance(found, (int, float)) or abs(found) < 1e39, (name, found)


def test_repeats_beyond_memory_are_refused_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from library.tiny_models import build_tiny
    from tests.runs.conftest import draw_pictures

    work = Work(tmp_path, build_tiny("flux", tmp_path / "tiny"), draw_pictures(tmp_path / "images", 2))
    started = time.perf_counter()
    told = refused_run(
        "flux", work.argv("out", dataset=work.dataset(subset_keys="num_repeats = 1000000000")), monkeypatch, capsys
    )
    assert re.search(r"2 images with their num_repeats are 2000000000 samples in an epoch; at most 50000000", told), (
        told
    )
    folder = tmp_path / "folders" / "2000000000_cat"
    draw_pictures(folder, 1)
    argv = [word for word in work.argv("out") if not word.startswith("--dataset_config")]
    told = refused_run("flux", [*argv, f"--train_data_dir={folder.parent}", "--resolution=64"], monkeypatch, capsys)
    assert "2000000000 samples in an epoch" in told
    assert time.perf_counter() - started < 60
