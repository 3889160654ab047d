"""What the curves hold: one point per optimizer step under the known names."""

import json

import pytest

from library.training.hooks.logging import LoggingHook, LossWindow
from library.training.hooks.losses import LossReader
from library.training.hooks.trackers import open_trackers, recorded_config, run_log_dir
from library.training.loop import fit
from library.training.option_groups import LoggingOptions
from tests.library.training.hooks.small_run import small_run


def read_events(folder):
    """Tag -> [(x, value)] of all event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return points


def test_tensorboard_gets_every_step_once(tmp_path):
    run = small_run([LossReader(every=3), LoggingHook(show_progress=False)], steps=6, logging_dir=str(tmp_path))
    fit(run)
    points = read_events(tmp_path)
    assert [x for x, _ in points["loss/current"]] == [1, 2, 3, 4, 5, 6]
    assert [x for x, _ in points["lr/weight"]] == [1, 2, 3, 4, 5, 6]
    assert {"loss/average", "lr/group1"} <= set(points) and "lr/group0" not in points
    assert [x for x, _ in points["loss/epoch_average"]] == [1]
    current = [value for _, value in points["loss/current"]]
    assert points["loss/average"][2][1] == pytest.approx(sum(current[:3]) / 3, rel=1e-5)
    assert points["loss/average"][5][1] == pytest.approx(
        (current[4] + current[5] + current[2] + current[3]) / 4, rel=1e-5
    )


def test_the_window_holds_the_last_epoch_and_never_adds_it_up_again():
    window = LossWindow(3)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
        window.put(step, loss)
    assert list(window.values) == [2.0, 3.0, 4.0] and window.average == 3.0
    assert LossWindow().average is None
    window = LossWindow(100_000)
    for step in range(1, 200_001):  # 15 billion additions if each average added up its epoch
        window.put(step, 0.1)
        assert abs(window.average - 0.1) < 1e-9


@pytest.mark.parametrize("stopped", [3, 4, 6, 9])
def test_a_resumed_log_equals_that_of_a_run_that_was_never_stopped(stopped):
    """Losses that a sum in another order would round otherwise."""
    losses = [0.1 * 3 ** (-1) ** k + k / 7 for k in range(12)]

    def averages(window, steps):
        return [(window.put(step, losses[step - 1]), window.average)[1] for step in steps]

    whole, first = averages(LossWindow(4), range(1, 13)), LossWindow(4)
    averages(first, range(1, stopped + 1))
    hook = LoggingHook(show_progress=False)
    hook.window = first
    again = LoggingHook(show_progress=False)
    again.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    assert averages(again.window.at(stopped, 4), range(stopped + 1, 13)) == whole[stopped:]


def test_a_window_of_other_steps_is_not_kept():
    window = LossWindow(4, [1.0, 2.0, 3.0, 4.0], step=8)
    assert window.at(2, 4).average is None
    assert list(window.at(8, 2).values) == [3.0, 4.0] and window.at(8, 2).average == 3.5
    earlier = LossWindow.of_state({"window": [5.0, 2.0, 3.0, 4.0]})  # step 5 stands at the place of step 1
    assert list(earlier.at(5, 4).values) == [2.0, 3.0, 4.0, 5.0]


def test_the_folder_of_a_run_has_prefix_and_time():
    folder = run_log_dir(LoggingOptions(logging_dir="logs", log_prefix="try-"), now=0.0)
    assert folder.parent.name == "logs" and folder.name.startswith("try-19") and len(folder.name) == 18
    assert run_log_dir(LoggingOptions()) is None


def test_nothing_is_opened_without_options():
    run = small_run([])
    assert open_trackers(run.config[LoggingOptions], run.config) == []


def test_the_recorded_options_hold_no_secret_and_no_path():
    run = small_run(
        [], huggingface_token="hf_secret", huggingface_repo_id="a/b", wandb_api_key="key", output_dir="out",
        output_name="name", resume="/home/someone/state", log_config=True,
    )
    recorded = recorded_config(run.config)
    text = json.dumps(recorded)
    assert (
        "secret" not in text
        and "someone" not in text
        and "wandb_api_key" not in recorded
        and "output_dir" not in recorded
    )
    assert recorded["output_name"] == "name" and recorded["max_train_steps"] == 1600
