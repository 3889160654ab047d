"""Losses are read in groups and reach their listeners complete, in order, once."""

import math
from types import SimpleNamespace

import pytest
import torch

from library.training.hooks.base import Hook, HookList
from library.training.hooks.losses import LossReader, _losses_of, _Pending, learning_rates
from library.training.loop import fit
from library.training.run import StepOutput
from library.training.step import merge_outputs
from tests.library.training.hooks.small_run import LineData, small_run


class Collector(Hook):
    """Keeps the readings, one list of losses each."""

    def __init__(self) -> None:
        self.readings = []

    def on_train_start(self, run) -> None:
        run.hooks.find(LossReader).listen(lambda losses: self.readings.append(list(losses)))

    def extra_step_logs(self, run) -> dict[str, float]:
        return {"extra/step": float(run.progress.global_step), "extra/tensor": torch.tensor(0.5)}


def test_every_third_step_is_read_and_the_rest_at_the_end():
    collector = Collector()
    fit(small_run([LossReader(every=3), collector], steps=8))
    assert [[entry.step for entry in reading] for reading in collector.readings] == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_a_loss_is_the_mean_over_the_samples_and_names_its_files():
    collector = Collector()
    run = small_run([LossReader(every=1), collector], steps=1)
    layer = run.models.denoiser
    expected = layer(torch.tensor([[0.0], [0.1]])).square().mean().item()
    fit(run)
    entry = collector.readings[0][0]
    assert entry.loss == pytest.approx(expected) and entry.local_loss == pytest.approx(expected)
    assert entry.files == ("0.png", "1.png")
    assert (entry.step, entry.epoch) == (1, 1)


def test_logs_hold_the_rate_that_the_step_used_and_what_hooks_add():
    collector = Collector()
    fit(small_run([LossReader(every=4), collector], steps=4))
    logs = [entry.logs for entry in collector.readings[0]]
    assert [entry["lr/weight"] for entry in logs] == pytest.approx([0.1 / (1 + k) for k in range(4)])
    assert [entry["lr/group1"] for entry in logs] == pytest.approx([0.01 / (1 + k) for k in range(4)])
    assert [entry["extra/step"] for entry in logs] == [1, 2, 3, 4]
    assert all(entry["extra/tensor"] == 0.5 for entry in logs)


def test_one_process_on_the_cpu_reads_what_several_would():
    pending = [_Pending(1, 1, torch.tensor(0.7), 2, ("a",), {"rate": 0.1, "extra": torch.tensor(0.3)})]
    alone = _losses_of(pending, SimpleNamespace(num_processes=1))
    assert alone == _losses_of(pending, SimpleNamespace(num_processes=2, sum_over_ranks=torch.Tensor.clone))


def test_epochs_are_counted_from_one():
    collector = Collector()
    fit(small_run([LossReader(every=1), collector], steps=6, data=LineData(per_epoch=4)))
    assert [reading[0].epoch for reading in collector.readings] == [1, 1, 1, 1, 2, 2]


def test_an_optimizer_that_estimates_its_step_has_a_product_logged():
    run = small_run([], steps=1)
    run.optimizer.param_groups[0]["d"] = 0.5
    rates = learning_rates(run)
    assert rates["lr/d*lr/weight"] == pytest.approx(0.05)
    assert "lr/d*lr/group1" not in rates


def test_a_step_without_samples_has_no_loss():
    reader, collector = LossReader(every=1), Collector()
    run = small_run([reader, collector], steps=1)
    run.hooks.on_train_start(run)
    output = run.step(run.data.batch(1, 0))
    output.count, output.loss_sum = 0, torch.zeros(())
    run.progress.global_step = 1
    reader.on_step_end(run, output)
    assert math.isnan(collector.readings[0][0].loss)


def test_values_of_several_micro_batches_are_means_over_their_samples():
    one = StepOutput(torch.tensor(0.5), torch.tensor(1.0), 1, {"loss/part": torch.tensor(4.0), "other": 1.0})
    three = StepOutput(torch.tensor(0.5), torch.tensor(3.0), 3, {"loss/part": torch.tensor(8.0)})
    empty = StepOutput(torch.tensor(0.0), torch.tensor(0.0), 0)
    merged = merge_outputs([one, three, empty])
    assert merged.logs == {"loss/part": torch.tensor(7.0), "other": 1.0} and merged.count == 4


def test_states_of_two_hooks_of_one_class_are_apart():
    class Counting(Hook):
        def __init__(self, start: int) -> None:
            self.count = start

    class Named(Counting):
        state_key = "chosen"

    first, second, third = Counting(1), Counting(2), Named(3)
    assert HookList([first, second, third]).by_key() == {"Counting": first, "Counting 2": second, "chosen": third}


def test_what_a_hook_has_not_filled_is_passed_over_and_own_and_inherited_methods_are_called():
    class Ending(Hook):
        def on_step_end(self, run, output):
            return "filled"

    class Child(Ending):
        pass

    own = Hook()
    own.on_step_end = lambda run, output: "own"
    assert HookList([Hook(), Child(), own]).on_step_end(None, None) == ["filled", "own"]
    assert HookList([Hook()]).extra_trainable_params() == [[]]
