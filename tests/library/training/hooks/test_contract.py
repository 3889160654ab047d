"""What a hook can rely on: its modules live like the trained ones, its weights for evaluation are put in place and
taken away, and it is closed whatever happens."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from library.core.errors import CheckpointError, ConfigError
from library.training.averaging import WeightAverage
from library.training.hooks.base import Hook
from library.training.loop import fit
from library.training.state import load_weights, save_state
from library.training.step import check_replacements
from library.training.updaters.base import trained_parameters
from tests.library.training.hooks.small_run import small_run

ROOM = Path(__file__).resolve().parents[4] / "library" / "training" / "hooks"


class Closing(Hook):
    def __init__(self, name: str, closed: list, fails: bool = False) -> None:
        self.name, self.closed, self.fails = name, closed, fails

    def close(self, run, error) -> None:
        self.closed.append((self.name, type(error).__name__))
        if self.fails:
            raise OSError("the disk went away")


class Breaking(Hook):
    def on_step_start(self, run, batch) -> None:
        if run.progress.global_step == 2:
            raise RuntimeError("out of memory")


def test_a_step_that_raises_closes_every_hook(caplog: pytest.LogCaptureFixture) -> None:
    closed: list = []
    run = small_run([Closing("first", closed, fails=True), Breaking(), Closing("last", closed)])
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(run)
    assert closed == [("first", "RuntimeError"), ("last", "RuntimeError")]
    assert "Closing could not be closed: the disk went away" in caplog.text


def test_a_run_that_ends_well_closes_them_too_and_tells_what_goes_wrong() -> None:
    closed: list = []
    fit(small_run([Closing("one", closed)]))
    assert closed == [("one", "NoneType")]
    with pytest.raises(OSError, match="the disk went away"):
        fit(small_run([Closing("one", closed, fails=True), Closing("two", closed)]))
    assert closed[-1] == ("two", "NoneType")


class WithModule(Hook):
    """A trained module and a frozen one."""

    def __init__(self, value: float = 1.0) -> None:
        self.head, self.frozen = torch.nn.Linear(2, 2), torch.nn.Linear(1, 1).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.fill_(value)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"head": self.head, "frozen": self.frozen}


def test_modules_of_a_hook_are_kept_in_states_and_follow_the_mode(tmp_path: Path) -> None:
    run = small_run([hook := WithModule(3.0)])
    hook.head.train()
    with run.weights_for_eval():
        assert not hook.head.training and not run.trainable.layer.training
    assert hook.head.training
    (group,) = hook.extra_trainable_params()
    assert group["name"] == "head" and len(group["params"]) == 2
    save_state(run, tmp_path / "a-state", {"current_epoch": 1, "current_step": 1})
    other = small_run([restored := WithModule(0.0)])
    load_weights(other, tmp_path / "a-state")
    assert torch.equal(restored.head.weight, hook.head.weight) and torch.equal(
        restored.frozen.weight, hook.frozen.weight
    )
    with pytest.raises(
        CheckpointError, match=r"hooks that this run does not have \(first: hook:WithModule.frozen.bias\)"
    ):
        load_weights(small_run([]), tmp_path / "a-state")


def test_weights_for_evaluation_are_those_of_every_hook_and_go_in_reverse_order() -> None:
    order: list[str] = []

    class Placing(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        @contextmanager
        def weights_for_eval(self, run):
            order.append(f"{self.name} in")
            yield
            order.append(f"{self.name} out")

    run = small_run([Placing("a"), Placing("b")])
    with run.weights_for_eval():
        order.append("used")
    assert order == ["a in", "b in", "used", "b out", "a out"]
    with run.weights_for_eval(averaged=False):
        assert len(order) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_is_put_in_place_and_taken_away_to_the_bit(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 3).to(dtype)
    average = WeightAverage(lambda: {"layer": layer})
    average.begin()
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.follow(0.5)
    moved = layer.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        torch.testing.assert_close(layer.weight.float(), (start.float() + moved.float()) / 2, rtol=1e-2, atol=1e-2)
        raise KeyError
    assert torch.equal(layer.weight, moved)
    average.follow(1.0)
    assert torch.equal(average.tensors["layer.weight"], moved.float())


def test_two_hooks_that_write_the_same_companion_are_refused() -> None:
    first, second = (type(f"Hook{i}", (Hook,), {"companions": ("-ema",)})() for i in (1, 2))
    with pytest.raises(ConfigError, match="Hook1, Hook2 all write files that end in -ema"):
        check_replacements([first, second])


def test_the_updater_has_every_group_of_the_optimizer() -> None:
    run = small_run([])
    assert [id(p) for p in trained_parameters(run.optimizer)] == [
        id(run.trainable.layer.weight),
        id(run.trainable.layer.bias),
    ]


def test_hooks_import_nothing_of_what_is_learned() -> None:
    """Trainables bring hooks; the way back would close a circle, at module level or in a function."""
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        ]
        skipped = {id(inner) for node in typing for inner in ast.walk(node)}
        names = [
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in skipped
        ]
        assert not [name for name in names if name.startswith("library.training.trainables")], path.name
