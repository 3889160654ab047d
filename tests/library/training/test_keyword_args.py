"""key=value arguments: several in one text, types by default, and what is no such argument."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training import optimizers, schedulers
from library.training.adapters import parse_pairs
from library.training.keyword_args import parse_keyword_args, split_arguments, split_words
from library.training.optimizers import OptimizerOptions
from library.training.parser_common import parse
from library.training.schedulers import SchedulerOptions


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("relative_step=False scale_parameter=False", ["relative_step=False", "scale_parameter=False"]),
        ("betas=(0.9, 0.99)   eps=1e-8", ["betas=(0.9, 0.99)", "eps=1e-8"]),
        ("betas=0.9, 0.99 eps=1e-8", ["betas=0.9, 0.99", "eps=1e-8"]),
        ("a='x y=1' b=2", ["a='x y=1'", "b=2"]),
        ("step_rules=1:10,0.1:20,0.01", ["step_rules=1:10,0.1:20,0.01"]),
        (r"preset=D:\my loras\p.toml", [r"preset=D:\my loras\p.toml"]),
        ("a = 1 b = 2", ["a = 1", "b = 2"]),
        ("foo", ["foo"]),
    ],
)
def test_a_text_with_several_arguments_is_split(text: str, pieces: list[str]) -> None:
    assert split_arguments(text) == pieces


@pytest.mark.parametrize(
    "given",
    [
        ["relative_step=False scale_parameter=False warmup_init=False"],
        ["relative_step=False", "scale_parameter=False warmup_init=False"],
    ],
)
def test_several_optimizer_arguments_in_one_text_are_several(given: list[str]) -> None:
    choice = optimizers.choose(OptimizerOptions(optimizer_type="Adafactor", optimizer_args=given))
    assert choice.kwargs == {"relative_step": False, "scale_parameter": False, "warmup_init": False}


def test_the_other_lists_of_arguments_are_split_too() -> None:
    assert parse_keyword_args(["step_size=3 gamma=0.5"], "lr_scheduler_args") == {"step_size": 3, "gamma": 0.5}
    assert parse_pairs(["conv_dim=4 conv_alpha=1", "algo='lo ha'"]) == {
        "conv_dim": "4",
        "conv_alpha": "1",
        "algo": "lo ha",
    }
    assert parse_pairs(["exclude_patterns=['.*txt.*=x', 'b']"]) == {"exclude_patterns": "['.*txt.*=x', 'b']"}
    config = parse(
        ["--network_args", "conv_dim=4 conv_alpha=1", "--optimizer_args", "weight_decay=0.1 eps=1e-7"], "sd", "network"
    )
    assert config.value("network_args") == ["conv_dim=4 conv_alpha=1"]


@pytest.mark.parametrize(
    "argument, words",
    [
        ("amsgrad=no", "sets amsgrad to 'no'; AdamW needs True or False there"),
        ("weight_decay=small", "sets weight_decay to 'small'; AdamW needs a number there, by default 0.01"),
        ("weight_decay=True", "AdamW needs a number there"),
        ("betas=high", "several numbers, separated by commas"),
        ("weight_decay==0.1", "one = too many"),
        ("eps=1e-8=2", "one = too many"),
    ],
)
def test_a_value_of_another_type_than_the_default_is_refused(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        optimizers.check(OptimizerOptions(optimizer_args=[argument]))


@pytest.mark.parametrize(
    "argument",
    ["amsgrad=1", "amsgrad=false", "weight_decay=0", "betas=0.9,0.99", "fused=None", "foreach=false", "eps=1e-7"],
)
def test_values_of_the_right_type_pass(argument: str) -> None:
    optimizers.check(OptimizerOptions(optimizer_args=[argument]))


def test_arguments_of_schedules_and_networks_are_checked_alike() -> None:
    with pytest.raises(ConfigError, match="StepLR needs a number there"):
        schedulers.check(
            SchedulerOptions(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=10 gamma=half"]),
            OptimizerOptions(),
        )
    with pytest.raises(ConfigError, match="--network_args has 'conv_dim==4'"):
        parse_pairs(["conv_dim==4"])


@pytest.mark.parametrize(
    "text, words",
    [
        (r"D:\loras\x.safetensors", [r"D:\loras\x.safetensors"]),
        (r'"D:\my loras\x.safetensors" E:\y.safetensors', [r"D:\my loras\x.safetensors", r"E:\y.safetensors"]),
        (r"\\server\share\x", [r"\\server\share\x"]),
        ("a=1 b='2 3'", ["a=1", "b=2 3"]),
    ],
)
def test_words_keep_their_backslashes(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("name", ["base_weights", "network_args", "optimizer_args"])
def test_a_list_given_as_one_text_in_a_file_keeps_its_backslashes(tmp_path, name: str) -> None:
    value = r"preset=D:\loras\x.toml" if name != "base_weights" else r"D:\loras\x.safetensors"
    (tmp_path / "train.toml").write_text(f"{name} = '{value}'\n", encoding="utf-8")
    assert parse(["--config_file", str(tmp_path / "train.toml")], "sd", "network").value(name) == [value]


def test_a_quote_that_is_not_closed_is_named(tmp_path) -> None:
    (tmp_path / "train.toml").write_text('base_weights = "it\'s.safetensors"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="base_weights is .*quotes are closed"):
        parse(["--config_file", str(tmp_path / "train.toml")], "sd", "network")


@pytest.mark.parametrize("name, shown", [("adafactor:1e-3", "adafactor:0.001"), ("adafactor", "adafactor:0.0001")])
def test_the_first_rate_of_adafactor_may_stand_in_its_name(name: str, shown: str) -> None:
    options, optimizer = (
        SchedulerOptions(lr_scheduler=name),
        OptimizerOptions(optimizer_type="AdaFactor", learning_rate=1e-4),
    )
    schedulers.check(options, optimizer)
    assert schedulers.name_in_use(options, optimizer) == shown
    from torch import nn, zeros

    built = optimizers.build(optimizer, [{"params": [nn.Parameter(zeros(2, 2))], "lr": 1e-4, "name": "unet"}])
    schedule = schedulers.build(options, built, learning_rate=1e-4, max_train_steps=10)
    assert schedule.get_last_lr() == [float(shown.partition(":")[2])]


@pytest.mark.parametrize("name", ["adafactor:fast", "adafactor:-1", "cosine:1e-3", "adafactor:"])
def test_other_rates_in_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a rate behind a colon has adafactor alone"):
        SchedulerOptions(lr_scheduler=name)
