"""Optimizer names, arguments, warnings and errors against the reference file optimizers.json."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from library.core.errors import ConfigError
from library.training import optimizers, schedulers
from library.training.keyword_args import parse_keyword_arg
from library.training.optimizers import OptimizerOptions
from library.training.schedulers import SchedulerOptions
from tests.golden_dir import behaviour_cases

FILE = "optimizers.json"


def untuple(value):
    return tuple(value["tuple"]) if isinstance(value, dict) and set(value) == {"tuple"} else value


def options_of(options) -> tuple[OptimizerOptions, SchedulerOptions]:
    pick = lambda cls: cls(**{k: v for k, v in options.items() if k in cls.__dataclass_fields__})  # noqa: E731
    return pick(OptimizerOptions), pick(SchedulerOptions)


def is_installed(choice) -> bool:
    return importlib.util.find_spec(choice.class_path.partition(".")[0]) is not None


@pytest.mark.parametrize("case", behaviour_cases(FILE, "names"))
def test_names(case):
    for spelling in case["spellings"]:
        choice = optimizers.choose(OptimizerOptions(optimizer_type=spelling))
        assert choice.class_path == case["class"]
        assert choice.recorded == case["defaults"]
        assert choice.kwargs == {**case["defaults"], **case["forced"]}
        assert choice.named_schedule_free == case["schedule_free"]
        assert choice.one_rate_for_all_groups == case["one_rate_for_all_groups"]
        if not is_installed(choice):
            with pytest.raises(ConfigError, match="pip install"):
                optimizers.check(OptimizerOptions(optimizer_type=spelling))
    if "nesterov" in case.get("note", ""):
        assert len(optimizers.log_lines(choice)) == 1


@pytest.mark.parametrize("case", behaviour_cases(FILE, "parsing"))
def test_parsing(case):
    if "error" in case:
        with pytest.raises(ValueError, match=re.escape(f"'{case['text']}'")):
            parse_keyword_arg(case["text"])
        return
    key, value = parse_keyword_arg(case["text"])
    expected = untuple(case["value"])
    assert key == case["key"] and value == expected and type(value) is type(expected)


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_cases(case):
    options, schedule = options_of(case["options"])
    choice = optimizers.choose(options)
    assert choice.class_path == case["class"]
    rate = None if choice.finds_own_rate else options.learning_rate
    assert {"lr": rate, **choice.kwargs} == {key: untuple(value) for key, value in case["kwargs"].items()}
    warned = optimizers.warnings_of(
        options, lr_scheduler=schedule.lr_scheduler,
        unet_lr=case["options"].get("unet_lr"), text_encoder_lr=case["options"].get("text_encoder_lr"),
    )
    names = {name for warning in warned for name in warning.options}
    if "warns_about" in case:
        assert names == set(case["warns_about"])
        assert all(name in warning.text for warning in warned for name in warning.options)
    if "warnings" in case:
        assert len(warned) == case["warnings"]
    for key, text in case.get("recorded", {}).items():
        assert str(case["options"].get(key[3:], getattr(schedule, key[3:], None))) == text
        assert str({**vars(schedule), **vars(options)}.get(key[3:], text)) == text, "the options are not rewritten"
    if "lr_scheduler" in case:
        assert schedulers.name_in_use(schedule, options) == case["lr_scheduler"]
    if "scheduler" in case:
        assert schedulers.name_in_use(schedule, options) == case["scheduler"]


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_built_optimizers(case):
    options, _ = options_of(case["options"])
    choice = optimizers.choose(options)
    if not is_installed(choice):
        with pytest.raises(ConfigError, match="pip install"):
            optimizers.build(options, [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5, "name": "unet"}])
        return
    build = optimizers.build(options, [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5, "name": "unet"}])
    if "metadata" in case:
        assert build.metadata_text == case["metadata"]
    for key, value in case["kwargs"].items():
        assert build.optimizer.defaults.get(key, untuple(value)) == untuple(value)
    expected_rate = None if case.get("group_rates") == "removed" or case["kwargs"]["lr"] is None else 0.5
    assert build.optimizer.param_groups[0]["lr"] == expected_rate
    assert build.optimizer.param_groups[0]["name"] == "unet"
    if "schedule_free" in case:
        assert build.schedule_free == case["schedule_free"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "errors"))
def test_errors(case):
    with pytest.raises(ConfigError) as error:
        optimizers.check(OptimizerOptions(**case["options"]))
    text = str(error.value)
    if "exclusive" in case["error"]:
        assert "exclusive" in text
    elif "optimizer_args" in case["options"]:
        assert any(argument.partition("=")[0] in text for argument in case["options"]["optimizer_args"])
    elif "package" in case["error"]:
        assert case["options"]["optimizer_type"].partition(".")[0] in text
    else:
        assert case["options"].get("optimizer_type", "") in text
        offered = [
            word
            for word in re.findall(r"\w+", case["error"])
            if word in optimizers.OPTIMIZERS or hasattr(torch.optim, word)
        ]
        for name in offered:
            assert f"did you mean '{name}'?".lower() in text.lower()
