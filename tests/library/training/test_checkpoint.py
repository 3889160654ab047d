"""Rules of saving and resuming beyond the recorded runs."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training.checkpoint import SaveRules, outdated_epoch, outdated_step, resume_point, train_state
from library.training.option_groups import ResumeOptions, SavingOptions


def test_the_newest_file_is_never_removed():
    assert outdated_epoch(4, 2, 0) == 2
    assert outdated_step(40, 10, 0) == 30


@pytest.mark.parametrize("step", [9, 10, 11, 37])
def test_only_multiples_are_saved_and_removed(step):
    rules = SaveRules(SavingOptions(save_every_n_steps=10, save_last_n_steps=0, save_state=True), num_epochs=2)
    saving = rules.after_step(step)
    assert (saving is not None) == (step == 10)
    if saving:
        assert saving.remove == saving.remove_states == ()


def test_states_are_not_removed_when_none_are_written():
    rules = SaveRules(SavingOptions(save_every_n_epochs=1, save_last_n_epochs=1), num_epochs=9)
    saving = rules.after_epoch(5)
    assert saving.remove == ("epoch-000004.safetensors",) and saving.remove_states == () and saving.state is None


def test_every_step_of_a_run_has_its_own_place():
    points = [
        resume_point(ResumeOptions(), {"current_step": step}, steps_per_epoch=3, accumulation=2, max_train_steps=9)
        for step in range(9)
    ]
    assert [(p.epoch, p.batches_to_skip) for p in points] == [(e, b) for e in (1, 2, 3) for b in (0, 2, 4)]
    assert [p.steps_left for p in points] == list(range(9, 0, -1))


def test_an_initial_step_beats_an_initial_epoch_and_the_state():
    point = resume_point(
        ResumeOptions(initial_step=4, initial_epoch=3), {"current_step": 8}, steps_per_epoch=3, accumulation=2,
        max_train_steps=9
    )
    assert (point.global_step, point.epoch, point.step_in_epoch, point.batches_to_skip) == (4, 2, 1, 2)


def test_a_finished_run_says_what_to_raise():
    with pytest.raises(ConfigError, match="raise --max_train_steps"):
        resume_point(ResumeOptions(), {"current_step": 9}, steps_per_epoch=3, accumulation=1, max_train_steps=9)


@pytest.mark.parametrize(("step", "epoch"), [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_state_at_the_border_belongs_to_the_finished_epoch(step, epoch):
    assert train_state(step, 10) == {"current_epoch": epoch, "current_step": step}


def test_states_that_a_signal_left_go_with_the_others():
    names = [f"lora-step{step:08d}-state" for step in (3, 5, 10, 13, 14)] + ["lora-step3-state", "other-step00000003-state"]
    rules = SaveRules(
        SavingOptions(output_name="lora", save_every_n_steps=5, save_last_n_steps_state=1, save_state=True), 4, 10
    )
    saving = rules.after_step(15)
    assert saving.stopped_until == 13 and saving.remove_states == ("lora-step00000010-state",)
    assert rules.stopped_states(names, 13) == ["lora-step00000003-state", "lora-step00000013-state"]
    assert rules.at_stop(14).stopped_until == 12 and rules.at_end(40).stopped_until == 38
    by_epoch = SaveRules(
        SavingOptions(output_name="lora", save_every_n_epochs=1, save_last_n_epochs=2, save_state=True), 9, 10
    )
    assert by_epoch.after_epoch(4).stopped_until == 20 and by_epoch.at_stop(47).stopped_until == 27
    assert by_epoch.stopped_states(names, 5) == ["lora-step00000003-state", "lora-step00000005-state"]


@pytest.mark.parametrize("options", [{"save_state": True}, {"save_last_n_steps_state": 1}])
def test_without_states_or_a_number_of_them_those_of_a_signal_stay(options):
    assert SaveRules(SavingOptions(save_every_n_steps=5, **options), 4, 10).after_step(15).stopped_until == 0
