"""The options of every training script: the known set and our own, frozen; each works, or is refused with the
reason."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.core.options import allows_none, is_bool_option, value_type
from library.families.registry import FAMILIES
from library.training.parser_common import parse, parse_command, script
from tests.option_sets import SCRIPTS, frozen_path, option_set, reason, status

ROOT = Path(__file__).resolve().parents[3]
NAMES = {f"{family}_{trainable}": (family, trainable) for family, trainable in SCRIPTS}
WHAT = {which: script(*names) for which, names in NAMES.items()}
OWN_OPTIONS = {
    "flux_network": {"clip_l_tokenizer", "t5xxl_tokenizer"},
    "chroma_network": {"clip_l_tokenizer", "t5xxl_tokenizer"},
    "sd_network": {"clip_tokenizer"},
    "sdxl_network": {"clip_tokenizer"},
    "sd_dreambooth": {"clip_tokenizer", "layer_lrs", "bf16_update"},
    "flux_full": {"clip_l_tokenizer", "t5xxl_tokenizer", "layer_lrs", "bf16_update"},
    "chroma_full": {"clip_l_tokenizer", "t5xxl_tokenizer", "layer_lrs", "bf16_update"},
    "sd3_full": {"clip_l_tokenizer", "clip_g_tokenizer", "t5xxl_tokenizer", "layer_lrs", "bf16_update"},
    "lumina_full": {"gemma2_tokenizer", "layer_lrs", "bf16_update"},
    "hunyuan_image_full": {"text_encoder_tokenizer", "layer_lrs", "bf16_update"},
    "anima_full": {"qwen3_tokenizer", "layer_lrs", "bf16_update"},
    "sd_full": {"clip_tokenizer", "layer_lrs", "bf16_update"},
    "sdxl_full": {"clip_tokenizer", "layer_lrs", "bf16_update"},
    "anima_network": {"qwen3_tokenizer"},
    "hunyuan_image_network": {"text_encoder_tokenizer"},
    "lumina_network": {"gemma2_tokenizer"},
    "sd3_network": {"clip_l_tokenizer", "clip_g_tokenizer", "t5xxl_tokenizer"},
    "sd_textual_inversion": {"clip_tokenizer"},
    "sd_textual_inversion_xti": {"clip_tokenizer"},
    "sdxl_textual_inversion": {"clip_tokenizer"},
    "sdxl_lllite": {"clip_tokenizer"},
    "flux_textual_inversion": {"clip_l_tokenizer", "t5xxl_tokenizer"},
    "sd3_textual_inversion": {"clip_l_tokenizer", "clip_g_tokenizer", "t5xxl_tokenizer"},
    "sd_control_net": {"clip_tokenizer", "layer_lrs", "bf16_update", "conditioning_range"},
    "sdxl_control_net": {"clip_tokenizer", "layer_lrs", "bf16_update", "conditioning_range"},
    "flux_control_net": {"clip_l_tokenizer", "t5xxl_tokenizer", "layer_lrs", "bf16_update", "conditioning_range"},
    "hunyuan_video_network": {
        "live_encoding", "text_encoder1_tokenizer", "text_encoder2_tokenizer", "guidance_unscaled",
    },
    "framepack_network": {
        "live_encoding", "text_encoder1_tokenizer", "text_encoder2_tokenizer", "one_frame_no_2x", "one_frame_no_4x",
    },
    "wan_network": {"live_encoding", "t5_tokenizer", "i2v", "adapter_per_expert"},
    "hunyuan_video_full": {
        "live_encoding", "text_encoder1_tokenizer", "text_encoder2_tokenizer", "guidance_unscaled", "layer_lrs",
        "bf16_update",
    },
}  # fmt: skip
OWN_OF_ALL = {
    "overwrite", "on_existing", "clamp_overflow", "strict", "check_images", "skip_image_resolution", "skip_bad_images",
    "fail_on_missing_captions", "ema", "ema_decay", "ema_power", "ema_every_n_steps", "ema_start_step", "ema_on_cpu",
    "plugins", "loss_weight", "loss_weighting", "loss_weighting_gamma", "detail_inv_t_min", "detail_inv_t_max",
    "weight_cap_ratio", "timestep_schedule_shift", "timestep_mix_low_prob", "hook", "textual_inversion_embeddings", "sigma_table", "sample_sigma_table", "show_timesteps_resolution",
    "dynamo_cache_size_limit", "vram_budget", "fp8_fast", "fp16_accumulation", "upcast_quantization", "mixed_precision_transformer",
    "quantize_base", "quantize_text_encoder", "offload_optimizer",
    "progress", "no_progress", "log_every", "loss_curve_steps", "log_metrics", "emit_events", "self_flow",
    "self_flow_ema_decay", "self_flow_head", "sra_enabled", "sra_block", "sra_weight", "sra_decay", "sra_decay_start",
    "sra_decay_end", "leap_enabled", "leap_ratio", "leap_variant", "leap_nested_grad_coe", "leap_min_gap",
    "leap_distance_weighting", "self_flow_gamma", "self_flow_gamma_warmup_steps", "mask_ratio",
    "student_feature_layer", "teacher_feature_layer", "network_weights_ema", "network_weights_proj",
    "self_flow_teacher_coupling_prob", "self_flow_teacher_mismatch_ratio", "self_flow_teacher_coupling_decay",
    "self_flow_teacher_coupling_decay_steps", "infonoise_enabled", "infonoise_K", "infonoise_N_warm", "infonoise_M",
    "infonoise_B", "infonoise_beta", "prefer_json",
    "infonoise_N_min", "infonoise_gate_pivot_c", "navit_packing", "navit_token_budget", "navit_max_images_per_pack",
    "navit_pack_strategy", "navit_pack_ffd_window", "navit_drop_last", "navit_text_trim_padding",
    "navit_native_resolution", "navit_native_over_budget",
}
VIDEO = ("hunyuan_video_network", "wan_network", "framepack_network", "hunyuan_video_full")
"""scripts of the known video trainer, whose shared options work in every script"""
OWN_OF_NETWORKS = {"drop_untrained"}
OWN_OF_WORDS_BESIDE = {"embedding_lr", "embedding_files"}
"""options that only this project has; extend the sets together with the documentation"""
OF_LAUNCH = {"mixed_precision": "no", "dynamo_backend": "inductor", "dynamo_dynamic": None}
"""of the known video scripts None, which is that of `accelerate launch` here too, NO, which is what --compile is not given
for here, and a switch whose other side is found out here"""
OTHER_DEFAULTS = {
    "hunyuan_video_network": {**OF_LAUNCH, "dit_in_channels": None},
    "wan_network": {**OF_LAUNCH, "task": None},
    "framepack_network": OF_LAUNCH,
    "hunyuan_video_full": {"trainable_modules": None, "dit_in_channels": None},
    "flux_network": {"model_prediction_type": "raw"},
    "flux_full": {"model_prediction_type": "raw"},
    "flux_textual_inversion": {"model_prediction_type": "raw"},
    "flux_control_net": {"model_prediction_type": "raw"},
    "chroma_network": {"model_prediction_type": "raw", "model_type": "chroma", "guidance_scale": 0.0},
    "chroma_full": {"model_prediction_type": "raw", "model_type": "chroma", "guidance_scale": 0.0},
}
"""defaults that differ on purpose (a documented fault of the old one, which the run tells at start; what chooses a variant, and what
means nothing there)"""


def family_of_script(family: str) -> str:
    """The family whose script it is: of a variant the one in which it is chosen."""
    return (FAMILIES[family].variant_of or (family,))[0]


def known(which: str) -> list[list]:
    """[name, type, nargs, default, choices] of every option that the known script of this name has; where none is known,
    those of the family's script for adapters without theirs, and those of the same training of another family."""
    if which in NAMES:
        family, trainable = NAMES[which]
        which = f"{family_of_script(family)}_{trainable}"
    path = Path(__file__).parent / f"{which}_options.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def each(*wanted: str) -> list:
    """One case for each option of each script with one of these statuses."""
    return [
        pytest.param(which, name, id=f"{which}-{name}")
        for which, what in WHAT.items() for name in what.owners if status(what, name) in wanted
    ]


@pytest.mark.parametrize("which", WHAT)
def test_the_options_are_the_frozen_ones(which: str) -> None:
    """A change that is meant: `python -m tests.option_sets`, and look at the difference."""
    frozen = json.loads(frozen_path(*NAMES[which]).read_text(encoding="utf-8"))
    found = option_set(WHAT[which])
    assert found.keys() == frozen.keys()
    for name, entry in frozen.items():
        assert found[name] == entry, name


@pytest.mark.parametrize("which", WHAT)
def test_the_set_of_options_is_the_known_one_and_our_own(which: str) -> None:
    """Shared options that the known script of a family does not have are refused here, or work here too."""
    names, of_script = {entry[0] for entry in known(which)}, set(WHAT[which].owners)
    assert names - of_script == set()
    elsewhere = {entry[0] for other in (*WHAT, *VIDEO) for entry in known(other)}
    family, trainable = NAMES[which]
    of_networks = OWN_OF_NETWORKS if trainable == "network" else set()
    of_words = OWN_OF_WORDS_BESIDE if of_networks and FAMILIES[family].embedding_keys else set()
    assert of_script - names - elsewhere == OWN_OPTIONS[which] | OWN_OF_ALL | of_networks | of_words
    assert {name for name in of_script - names & elsewhere if status(WHAT[which], name) == "equivalent"} <= names


@pytest.mark.parametrize("which", WHAT)
def test_options_keep_their_types_defaults_and_choices(which: str) -> None:
    what, entries = WHAT[which], known(which)
    assert entries
    for name, kind, nargs, default, choices in entries:
        owner, spec = what.owners[name], what.spec(name)
        assert what.default(name) == OTHER_DEFAULTS.get(which, {}).get(name, default), name
        assert is_bool_option(owner, name) == (kind == "bool"), name
        if kind in ("int", "float") and spec.convert is None:
            assert value_type(owner, name).__name__ == kind, name
        assert (spec.nargs == "*") == (nargs == "*"), name
        if choices and spec.choices is not None:
            convert = spec.convert or str
            assert {c if c is None else convert(c) for c in choices} <= {c if c is None else convert(c) for c in spec.choices}
        if default is None and name not in OTHER_DEFAULTS.get(which, {}):
            assert allows_none(owner, name), name


def some_value(which: str, name: str) -> str:
    """A value of an option that asks for something."""
    what = WHAT[which]
    owner, spec = what.owners[name], what.spec(name)
    if spec.choices:
        return str(
            next(choice for choice in reversed(spec.choices) if choice is not None and choice != what.default(name))
        )
    if is_bool_option(owner, name):
        return "true"
    return {int: "7", float: "0.7"}.get(value_type(owner, name), "something")


@pytest.mark.parametrize("which, name", each("refused", "foreign"))
def test_a_refused_option_is_refused_by_name_with_a_reason(which: str, name: str) -> None:
    what = WHAT[which]
    with pytest.raises(ConfigError) as caught:
        parse([f"--{name}", some_value(which, name)], what.family, what.trainable)
    mine = [problem for problem in caught.value.problems if problem.startswith(f"--{name} ")]
    told = reason(what, name)
    assert len(mine) == 1 and told in mine[0]
    assert len(told) > 15


@pytest.mark.parametrize("which, name", each("ignored", "foreign"))
def test_an_option_without_meaning_in_a_file_is_ignored_with_a_reason(which: str, name: str, tmp_path: Path) -> None:
    what = WHAT[which]
    (tmp_path / "train.toml").write_text(f'{name} = "{some_value(which, name)}"\n', encoding="utf-8")
    config = parse(["--config_file", str(tmp_path / "train.toml")], what.family, what.trainable)
    assert [item.written for item in config.ignored] == [f"{name} = {some_value(which, name)!r}"]
    assert config.ignored[0].reason == reason(what, name) and len(config.ignored[0].reason) > 15
    assert config.value(name) == what.default(name) and name not in config.explicit


@pytest.mark.parametrize("which, name", each("ignored"))
def test_an_option_without_meaning_is_ignored_with_a_reason(which: str, name: str) -> None:
    what = WHAT[which]
    (item,) = parse([f"--{name}", some_value(which, name)], what.family, what.trainable).ignored
    assert item.written == f"--{name} {some_value(which, name)}" and item.reason == reason(what, name)


@pytest.mark.parametrize("which", WHAT)
def test_only_what_the_known_script_takes_is_ignored_and_only_what_it_lacks_is_foreign(which: str) -> None:
    names, what = {entry[0] for entry in known(which)}, WHAT[which]
    by_status = {
        wanted: {name for name in what.owners if status(what, name) == wanted} for wanted in ("ignored", "foreign")
    }
    assert by_status["ignored"] <= names and not by_status["foreign"] & names


@pytest.mark.parametrize("which, name", each("refused", "foreign", "ignored"))
def test_the_default_of_an_option_without_meaning_passes(which: str, name: str) -> None:
    what = WHAT[which]
    default = what.default(name)
    text = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    if text == "" and not allows_none(what.owners[name], name):
        pytest.skip("the default cannot be written")
    assert parse([f"--{name}={text}"], what.family, what.trainable).value(name) == default


@pytest.mark.parametrize("which, name", each("equivalent"))
def test_an_equivalent_option_is_answered_with_one_line(which: str, name: str) -> None:
    what = WHAT[which]
    value = [] if is_bool_option(what.owners[name], name) else [some_value(which, name)]
    parsed = parse_command([f"--{name}", *value], what.family, what.trainable)
    assert [note.text for note in parsed.notes] == [what.spec(name).reason]


def names_read(tree: ast.AST) -> Iterator[str]:
    """Attributes and whole string constants of a module, outside the range checks of option groups."""
    skipped = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for node in ast.walk(function)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@functools.lru_cache(maxsize=None)
def names_in(path: Path) -> frozenset[str]:
    return frozenset(names_read(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("which", WHAT)
def test_every_option_that_works_is_read_somewhere(which: str) -> None:
    """In a file that a run of this family uses: those of other families do not count."""
    what = WHAT[which]
    not_use = {"known_options_table.py", "known_options.py", "checks.py"}
    others = {other for other, _ in SCRIPTS} - {what.family, family_of_script(what.family)}
    read = {"overwrite"}  # its whole job is a check
    for folder in ("library", "networks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in not_use and not others & set(path.stem.split("_")):
                read |= names_in(path)
    metadata = {name for name in what.owners if name.startswith("metadata_")} if "metadata_" in read else set()
    assert [name for name in what.owners if status(what, name) == "works" and name not in read | metadata] == []


@pytest.mark.parametrize("which", WHAT)
def test_names_in_the_lists_of_the_family_are_options(which: str) -> None:
    what = WHAT[which]
    for names in (what.refused, what.ignored, what.foreign, what.neutral, what.stands_for):
        assert set(names) <= set(what.owners)
    assert set(what.defaults) <= set(what.owners)
