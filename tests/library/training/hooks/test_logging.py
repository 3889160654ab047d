"""What the curves hold: one point per optimizer step under the known names."""

import json
import logging
import sys

import pytest

from library.training.hooks.logging import LoggingHook, LossWindow, lines_above_bar
from library.training.hooks.losses import LossReader
from library.training.hooks.trackers import open_trackers, recorded_config, run_log_dir
from library.training.loop import fit
from library.training.option_groups import LoggingOptions
from tests.library.training.hooks.small_run import LineData, small_run


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
    assert points["loss/average"][5][1] == pytest.approx((current[4] + current[5] + current[2] + current[3]) / 4, rel=1e-5)


def test_the_window_overwrites_the_same_place_of_the_last_epoch():
    window = LossWindow()
    for index, loss in [(0, 1.0), (1, 2.0), (2, 3.0), (0, 4.0)]:
        window.put(index, loss)
    assert window.values == [4.0, 2.0, 3.0] and window.average == 3.0
    assert LossWindow().average is None


def test_a_resumed_log_goes_on_with_the_same_average():
    whole = LoggingHook(show_progress=False)
    fit(small_run([LossReader(every=1), whole], steps=6, data=LineData(per_epoch=4)))
    again = LoggingHook(show_progress=False)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again.window.average == whole.window.average


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
    assert "secret" not in text and "someone" not in text and "wandb_api_key" not in recorded and "output_dir" not in recorded
    assert recorded["output_name"] == "name" and recorded["max_train_steps"] == 1600


def test_the_bar_shows_steps_and_average_as_lines_in_a_log_file(capsys):
    hook = LoggingHook()
    fit(small_run([LossReader(every=1), hook], steps=2))
    lines = capsys.readouterr().err.splitlines()
    assert "2/2" in lines[-1] and "avr_loss=" in lines[-1] and all(line.startswith("steps:") for line in lines)


def test_log_lines_go_above_the_bar_and_the_console_is_given_back(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        restore = lines_above_bar()
        logging.getLogger("x").warning("a line")
        assert handler.stream is not sys.stderr
        restore()
        assert handler.stream is sys.stderr
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.endswith("a line\n")
