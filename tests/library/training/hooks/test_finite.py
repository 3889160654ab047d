"""A run with a loss or weights that are not finite ends before anything of it is saved."""

import pytest
import torch

from library.core.errors import TrainingError
from library.training.hooks.base import Hook
from library.training.hooks.finite import NonFiniteGuard
from library.training.hooks.losses import LossReader
from library.training.loop import fit
from tests.library.training.hooks.small_run import LineData, small_run


class SaveEverySteps(Hook):
    """Saves as a checkpoint hook does: asks the guard first."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.saved = []

    def on_step_end(self, run, output) -> None:
        if run.progress.global_step % self.every == 0:
            run.hooks.find(NonFiniteGuard).check_before_save(run)
            self.saved.append(run.progress.global_step)
            run.hooks.on_post_save(run, f"run-step{run.progress.global_step}.safetensors", {})


def test_the_message_names_step_files_and_last_good_checkpoint():
    saver = SaveEverySteps(1)
    hooks = [LossReader(every=1), NonFiniteGuard(), saver]
    with pytest.raises(TrainingError) as caught:
        fit(small_run(hooks, data=LineData(bad_batch=2)))
    text = str(caught.value)
    assert "step 3" in text and "4.png, 5.png" in text and "run-step2.safetensors" in text
    assert "3.png" not in text
    assert saver.saved == [1, 2]


def test_a_late_reading_still_names_the_right_step_and_files():
    hooks = [LossReader(every=4), NonFiniteGuard()]
    run = small_run(hooks, data=LineData(bad_batch=1))
    with pytest.raises(TrainingError, match="step 2") as caught:
        fit(run)
    assert run.progress.global_step == 4
    assert "2.png, 3.png" in str(caught.value) and "No checkpoint was saved before" in str(caught.value)


def test_a_save_reads_what_is_pending():
    saver = SaveEverySteps(3)
    with pytest.raises(TrainingError, match="step 2"):
        fit(small_run([LossReader(every=100), NonFiniteGuard(), saver], data=LineData(bad_batch=1)))
    assert saver.saved == []


def test_weights_that_are_not_finite_are_not_saved_although_the_loss_was():
    run = small_run([LossReader(every=1), NonFiniteGuard()])
    run.hooks.on_train_start(run)
    with torch.no_grad():
        run.models.denoiser.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="linear.weight"):
        run.hooks.find(NonFiniteGuard).check_before_save(run)


def test_a_healthy_run_passes():
    saver = SaveEverySteps(2)
    fit(small_run([LossReader(every=3), NonFiniteGuard(), saver]))
    assert saver.saved == [2, 4, 6, 8]
