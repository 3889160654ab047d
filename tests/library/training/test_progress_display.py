"""What a run shows of itself: which display is chosen, what its lines say, and the panel at every size."""

from __future__ import annotations

import logging
import math
import re
import sys

import pytest

from library.core.errors import ConfigError
from library.core.options import Config
from library.training import checks, progress_display
from library.training.hooks.logging import LoggingHook
from library.training.hooks.losses import LossReader
from library.training.idle_options import ignored
from library.training.loop import fit
from library.training.option_groups import ProgressOptions
from library.training.parser_common import script
from library.training.progress_display import Bar, LogLines, can_hold_panel, lines_above_bar, open_display
from library.training.progress_facts import Length, Meter, Status, clock, rates_text
from tests.library.training.hooks.small_run import small_run

LENGTH = Length(total=40, done=0, num_epochs=4, name="lora")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter_at(clock: Clock, done: int = 0) -> Meter:
    return Meter("cpu", done, clock)


def status(step: int, loss: float = 0.5) -> Status:
    return Status(step, 1 + (step - 1) // 10, [loss], loss / 2, {"lr/unet": 1e-4})


def test_the_rate_is_a_running_mean_without_pauses_and_without_the_first_reading():
    now = Clock()
    meter = meter_at(now, done=10)
    assert meter.steps_per_second is None and meter.remaining(3) is None
    now.now += 50  # the first step prepares everything
    meter.put(11)
    assert meter.seconds_per_step == 50
    now.now += 4
    meter.put(13)
    assert meter.seconds_per_step == 2
    now.now += 3
    meter.pause()
    now.now += 1000
    meter.go_on()
    meter.go_on()
    now.now += 3
    meter.put(14)
    assert meter.seconds_per_step == pytest.approx(0.9 * 2 + 0.1 * 6)
    meter.put(14)
    assert meter.remaining(10) == pytest.approx(24) and meter.elapsed == 1060


def test_a_line_of_the_log_after_every_so_many_steps_and_after_the_last(caplog):
    now = Clock()
    lines = LogLines(Length(38, 0, 4), meter := meter_at(now), every=10)
    lines.show({"val_avg_loss": "0.3"})
    with caplog.at_level(logging.INFO):
        for step in (4, 8, 12, 16, 20, 36, 37, 38):  # a reading may cover several steps
            now.now += 2
            meter.put(step)
            lines.update(status(step))
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in told] == [f"step {n}/38" for n in (12, 20, 36, 38)]
    assert told[0].startswith("step 12/38, epoch 2/4: loss 0.5, mean 0.25, lr 0.0001, val_avg_loss 0.3, ")
    assert "2.00 steps/s, 0:00:06 elapsed, 0:00:13 left" in told[0] and "left" not in told[-1]


def test_texts_of_rates_and_times():
    assert rates_text({}) == "" and rates_text({"lr/a": 1e-4, "lr/b": 1e-4, "norm": 3.0}) == "lr 0.0001"
    assert rates_text({"lr/a": 1.0, "lr/d*lr/a": 2e-5, "lr/b": 1e-3}) == "lr a 2e-05 b 0.001"
    assert clock(3723.9) == "1:02:03"


def test_options_that_contradict_each_other_are_refused_and_idle_ones_listed():
    with pytest.raises(ConfigError) as error:
        ProgressOptions(progress="bar", no_progress=True, log_every=0, loss_curve_steps=0)
    assert len(error.value.problems) == 4
    for given, shown in (({}, None), ({"no_progress": True}, "lines"), ({"log_every": 3}, "lines"),
                         ({"progress": "lines", "log_every": 3}, "lines"), ({"progress": "none"}, "none")):  # fmt: skip
        assert ProgressOptions(**given).display == shown
    classes = script("flux", "network").classes
    listed = ignored(Config.read({"no_progress": True, "loss_curve_steps": 9}, classes))
    assert [str(item).split(":")[0].split(" ")[0] for item in listed] == ["--loss_curve_steps"]
    assert not ignored(Config.read({"loss_curve_steps": 9}, classes))
    hidden = ignored(Config.read({"log_every": 5, "console_log_level": "ERROR"}, classes))
    assert "--console_log_level ERROR" in str(hidden[0]) and not ignored(Config.read({"log_every": 5}, classes))


def test_the_panel_is_refused_without_its_package_and_told_of_without_a_terminal(monkeypatch):
    config = Config.read({"progress": "panel"}, script("flux", "network").classes)
    assert checks.progress_problems(config) == []
    assert any("--progress is panel" in line for line in checks.warnings(config))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'rich'" in checks.progress_problems(config)[0]
    assert checks.progress_problems(Config.read({}, script("flux", "network").classes)) == []


def test_rich_is_not_imported_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert not can_hold_panel()
    meter = meter_at(Clock())
    for options, kind in ((ProgressOptions(), Bar), (ProgressOptions(progress="panel"), Bar),
                          (ProgressOptions(no_progress=True), LogLines)):  # fmt: skip
        display = open_display(options, LENGTH, meter)
        assert type(display) is kind
        display.close()
    assert open_display(ProgressOptions(progress="none"), LENGTH, meter) is None


def test_the_bar_shows_steps_and_average_as_lines_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
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


# ---- the panel -------------------------------------------------------------------------------------------------------

panel = pytest.importorskip("library.training.progress_panel", reason="the panel needs the package rich")


class StillFrame:
    """In the place of what draws."""

    def __init__(self, stream, render) -> None:
        self.told = []

    def start(self): ...
    def holding(self): return logging._lock
    def refresh(self): ...
    def draw(self): ...
    def is_ours(self): return True
    def write_soon(self, text): self.told.append(text)  # fmt: skip


@pytest.fixture
def still_panel(monkeypatch):
    monkeypatch.setattr(panel, "LiveFrame", StillFrame)
    now = Clock()
    shown = panel.PanelDisplay(LENGTH, meter := meter_at(now), losses_shown=30)
    for step in range(1, 37):
        now.now += 1.25
        meter.put(step)
        shown.update(status(step, 100.0 if step < 6 else math.nan if step == 8 else 1 / step))
    return shown


def plain(lines):
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def test_the_panel_tells_what_a_run_does(still_panel):
    still_panel.show({"val_avg_loss": "0.3"})
    text = "\n".join(plain(still_panel.lines(79, 40, "sampling 30%")))
    for part in ("lora", "step 36/40", "90%", "epoch 4/4", "loss 0.02778", "mean of an epoch 0.01389", "lr 0.0001",
                 "val_avg_loss 0.3", "1.25 s/step", "0:00:45 elapsed", "0:00:05 left", "GiB",
                 "sampling 30%"):  # fmt: skip
        assert part in text, (part, text)
    told = []
    still_panel.telling(told.append)("SIGINT")
    assert still_panel._frame.told == ["SIGINT"] and not told


def test_the_curve_is_of_the_last_losses(still_panel):
    """Not of the first ones: these were 100."""
    assert len(still_panel._losses) == 30 and max(still_panel._losses) == 1 / 6
    text = "\n".join(plain(still_panel.lines(79, 40, "")))
    assert "0.1667 │█" in text and "0.02778 │" in text


def test_the_panel_fits_into_every_terminal(still_panel):
    still_panel.show({"a text": "y" * 200})
    for width in (1, 2, 9, 20, 39, 79, 300):
        for height in (1, 2, 5, 9, 11, 15, 23, 80):
            for activity in ("", "z" * 200):
                lines = plain(still_panel.lines(width, height, activity))
                assert 1 <= len(lines) <= (height + 1) // 2 and max(map(len, lines)) <= width, (width, height, lines)


def test_a_curve_has_bucket_means_in_order():
    assert panel.bucket_means([1.0, 2.0, 3.0, 5.0, 7.0], 2) == [1.5, 5.0]
    assert panel.bucket_means([1.0, 2.0], 60) == [1.0, 2.0]
    assert panel.curve_rows([4.0, 2.0, 0.0], 60, 3, True) == ["        4 │█  ", "          │█▄ ", "        0 │██▁"]
    assert panel.curve_rows([4.0, 2.0, 0.0], 60, 3, False) == ["        4 |*  ", "          | * ", "        0 |  *"]
    assert panel.curve_rows([2.0, 2.0], 60, 2, True)[1].endswith("▁▁")  # a flat one


def test_what_runs_on_a_console_without_such_letters_is_ascii(still_panel, tmp_path):
    from rich.console import Console

    with open(tmp_path / "ascii", "w", encoding="ascii") as file:
        still_panel._console = Console(file=file, highlight=False)
        assert "\n".join(still_panel.lines(79, 40, "")).isascii()
    assert progress_display.LOSSES_SHOWN == 500
