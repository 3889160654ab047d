"""Settings of every test: one thread (so that runs on any machine give the same bytes), nothing fetched from a hub, and
no handler of the log that a run has set up stays for the next test."""

import gc
import logging
import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402 - after the settings

from tests import pairwise  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="cross products of settings in full, not pairwise")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell that started the tests in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "cross_product(*axes): a parameter or a tuple of parameters each; runs pairwise without --full"
    )
    config.addinivalue_line("markers", "of_the_loop: what no family does itself (tests/runs/test_families.py)")
    config.addinivalue_line("markers", "full: a case much like another one; runs with --full alone")


def pytest_collection_modifyitems(config, items):
    chosen = any("[" in word for word in config.args)  # a case that was named runs
    if not config.getoption("full") and not chosen:
        kept = pairwise.chosen([item for item in items if item.get_closest_marker("full") is None])
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


_looked_through = {"modules": 0}


@pytest.fixture(autouse=True)
def quick_collections():
    """Runs and image scripts collect garbage after each part of a model, which would take most of their time here: all
    tests and all modules that were ever imported are looked at. What exists when something new was imported is left out
    from then on."""
    if len(sys.modules) != _looked_through["modules"]:
        gc.collect()
        gc.freeze()
        _looked_through["modules"] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def sketched_curves(request):
    """The picture of the losses is a fifth of a tiny run. It is drawn by whatever asks for `drawn_curves`, by runs in
    processes of their own and under --full; elsewhere a file of one point stands for it."""
    if request.config.getoption("full") or "torch" not in sys.modules:  # without torch, nothing trains in this process
        yield None
        return
    from PIL import Image

    from library.core.atomic_file import atomic_path
    from library.training.hooks import loss_curve

    def sketch(path, steps, losses, averages, validation):
        with atomic_path(path) as temporary:
            Image.new("L", (1, 1)).save(temporary, format="png")

    with pytest.MonkeyPatch.context() as patch:
        drawn = loss_curve.plot_losses
        patch.setattr(loss_curve, "plot_losses", sketch)
        yield drawn


@pytest.fixture
def drawn_curves(sketched_curves, monkeypatch):
    """The picture of the losses is really drawn."""
    if sketched_curves is not None:
        monkeypatch.setattr("library.training.hooks.loss_curve.plot_losses", sketched_curves)


@pytest.fixture(autouse=True)
def log_as_before():
    root = logging.getLogger()
    _without_handlers(root)  # of a run that a fixture of a module has made
    level = root.level
    yield
    root.setLevel(level)
    _without_handlers(root)


def _without_handlers(root):
    for handler in list(root.handlers):
        if getattr(handler, "set_by_atelier", False):
            root.removeHandler(handler)
            handler.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test printed of names that are not UTF-8 must not stop the process that collects the reports."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    report.user_properties = list(report.user_properties)
    return report
