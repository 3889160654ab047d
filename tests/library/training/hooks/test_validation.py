"""Validation looks at held-out data with fixed noise levels and leaves the training as it was."""

import dataclasses
import logging

import pytest
import torch

from library.training.hooks.logging import LoggingHook
from library.training.hooks.loss_curve import LossCurveHook
from library.training.hooks.losses import LossReader
from library.training.hooks.validation import ValidationHook
from library.training.loop import fit
from library.training.run import Run
from tests.library.training.hooks.small_run import LineData, LineStep, small_run


def validation_data() -> LineData:
    data = LineData()
    data.validation = [data.batch(0, 5), data.batch(0, 6)]
    return data


def hooks_of(validation: ValidationHook) -> list:
    return [LossReader(every=1), LoggingHook(show_progress=False), LossCurveHook(), validation]


def mean_by_hand(run, batches) -> float:
    losses = [
        (run.models.denoiser(batch.inputs) - batch.targets - time).square().mean()
        for batch in batches
        for time in (0.2, 0.4, 0.6, 0.8)
    ]
    return torch.stack(losses).mean().item()


def test_the_loss_is_the_mean_over_samples_and_levels():
    hook, data = ValidationHook(seed=3), validation_data()
    run = small_run(hooks_of(hook), data=data)
    assert hook.validate(run) == pytest.approx(mean_by_hand(run, data.validation))
    limited = small_run(hooks_of(hook), data=data, max_validation_steps=1)
    assert hook.validate(limited) == pytest.approx(mean_by_hand(limited, data.validation[:1]))


def test_the_loss_of_each_level_is_told_beside_the_mean():
    hook, data, logged = ValidationHook(seed=3), validation_data(), []
    run = small_run(hooks_of(hook), data=data, steps=4)
    log = run.hooks.find(LoggingHook)
    plain_log = log.log
    log.log = lambda values, **where: (logged.append(dict(values)), plain_log(values, **where))
    fit(run)
    weights = run.models.denoiser
    for time in (0.2, 0.4, 0.6, 0.8):
        losses = [(weights(batch.inputs) - batch.targets - time).square().mean() for batch in data.validation]
        assert hook.level_losses[f"{time:g}"] == pytest.approx(torch.stack(losses).mean().item())
    last = [values for values in logged if "loss/validation/epoch_average" in values][-1]
    told = {name.rpartition("_")[2]: loss for name, loss in last.items() if "_level_" in name}
    assert told == hook.level_losses and sum(told.values()) / 4 == pytest.approx(hook.last_loss)
    assert run.hooks.find(LossCurveHook).levels[4] == hook.level_losses


def test_it_leaves_mode_gradients_and_generators_alone():
    hook = ValidationHook(seed=3)
    run = small_run(hooks_of(hook), data=validation_data())
    run.models.denoiser.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = hook.validate(run)
    assert run.models.denoiser.training and run.models.denoiser.weight.grad is None
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert hook.validate(run) == first


def test_curves_start_at_the_base_and_have_the_known_names():
    hook, logged = ValidationHook(seed=3), []
    run = small_run(hooks_of(hook), data=validation_data(), steps=8, validate_every_n_steps=3)
    log = run.hooks.find(LoggingHook)
    plain_log = log.log
    log.log = lambda values, **where: (logged.append((dict(values), where)), plain_log(values, **where))
    fit(run)
    steps = [values for values, where in logged if "loss/validation/step_average" in values]
    epochs = [values for values, where in logged if "loss/validation/epoch_average" in values]
    assert len(steps) == 2 and len(epochs) == 3
    assert epochs[0]["loss/validation/epoch_divergence"] is None
    assert steps[0]["loss/validation/step_divergence"] is not None
    assert epochs[-1]["loss/validation/epoch_divergence"] == pytest.approx(hook.last_loss - log.window.average)
    curve = run.hooks.find(LossCurveHook)
    assert [step for step, _ in curve.validation] == [0, 3, 4, 6, 8]
    assert curve.validation[-1][1] < curve.validation[0][1] or curve.validation[0][1] < 0.5


def test_without_held_out_data_nothing_happens(monkeypatch):
    monkeypatch.setattr(Run, "weights_for_eval", lambda *_: pytest.fail("weights are put in place"))
    hook = ValidationHook(seed=3)
    run = small_run(hooks_of(hook))
    fit(run)
    assert hook.last_loss is None and run.hooks.find(LossCurveHook).validation == []


def test_a_run_that_stops_inside_an_epoch_ends_with_a_measurement():
    hook = ValidationHook(seed=3)
    run = small_run(hooks_of(hook), data=validation_data(), steps=6)
    fit(run)
    assert [step for step, _ in run.hooks.find(LossCurveHook).validation] == [0, 4, 6]


def test_one_step_is_measured_once(monkeypatch):
    hook = ValidationHook(seed=3)
    run = small_run(hooks_of(hook), data=validation_data(), steps=4, validate_every_n_steps=4)
    calls = []
    measure = hook.validate
    monkeypatch.setattr(hook, "validate", lambda run: calls.append(run.progress.global_step) or measure(run))
    fit(run)
    assert calls == [0, 4]


class RollingStep(LineStep):
    """Reads the global generator, as code of other packages may."""

    def __call__(self, batch, times=None):
        output = super().__call__(batch, times)
        output.loss_sum = output.loss_sum + torch.rand(())
        return output


def test_code_that_reads_the_global_generator_gets_the_same_numbers_each_time():
    hook = ValidationHook(seed=3)
    run = small_run(hooks_of(hook), data=validation_data())
    run = dataclasses.replace(run, step=RollingStep(run.models.denoiser))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = hook.validate(run)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert hook.validate(run) == first


class RisingData(LineData):
    """Every validation finds the targets further away, but for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    @property
    def holds_out(self) -> bool:
        return True

    def validation_batches(self, limit=None):
        self.passes += 1
        batch = self.batch(0, 5)
        return [
            dataclasses.replace(
                batch, targets=torch.full((2, 1), {1: 50.0, 2: 1.0}.get(self.passes, 10.0 * self.passes))
            )
        ]


def test_the_lowest_loss_marks_its_epoch(caplog, tmp_path):
    validation = ValidationHook(seed=3)
    run = small_run(hooks_of(validation), data=RisingData(), steps=16)
    with caplog.at_level(logging.INFO, logger="library.training.hooks.validation"):
        fit(run)
    assert [line.endswith("the lowest so far") for line in caplog.messages if "validation loss after" in line] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert "in epoch 1 (after step 4)" in caplog.messages[-1]
    resumed = ValidationHook(seed=3)
    resumed.load_state_dict(validation.state_dict())
    assert resumed.lowest == validation.lowest and resumed.lowest[1] == 4
