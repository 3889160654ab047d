"""--hook package.module:Class: a hook of the user's joins a run, with options of its own, and is checked like what is
built in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.safetensors_utils import load_safetensors
from library.training import cli
from library.training.loop import fit
from library.training.state_files import WEIGHTS_FILE
from library.training.wiring.flux import FluxFamily
from tests.runs import own_hooks
from tests.runs.conftest import Work, draw_pictures, fingerprint, largest_difference, read_parts
from tests.runs.test_exactness import Stopped, stop_after
from tests.runs.test_processes import OPTIONS, train_in_two

PULL, PLAIN = "--hook=tests.runs.own_hooks:Pull", "--hook=tests.runs.own_hooks:Plain"


def test_its_module_is_trained_in_a_group_of_its_own(work: Work) -> None:
    run = work.trainer("out", PULL, "--pull_strength=2", "--max_train_steps=3").prepare()
    group = run.optimizer.param_groups[-1]
    assert group["name"] == "scale" and group["lr"] == 1e-2
    fit(run)
    hook = own_hooks.Pull.made[-1]
    assert hook.options.pull_strength == 2 and hook.closed == [None]
    assert 0.02 < hook.scale.weight.item() < 0.04  # three steps of Adam at 0.01


def test_several_hooks_and_options_from_a_file(work: Work) -> None:
    path = work.folder / "own.toml"
    path.write_text(
        'hook = ["tests.runs.own_hooks:Pull", "tests.runs.own_hooks:Plain"]\npull_strength = 0.25\n', encoding="utf-8"
    )
    before = own_hooks.Plain.steps
    work.train("out", f"--config_file={path}", "--max_train_steps=2")
    assert own_hooks.Plain.steps == before + 2 and own_hooks.Pull.made[-1].options.pull_strength == 0.25
    work.train("other", PULL, PLAIN, "--max_train_steps=2")
    assert own_hooks.Plain.steps == before + 4 and own_hooks.Pull.made[-1].options.pull_strength == 0.5


def test_a_hook_that_does_nothing_changes_nothing(work: Work) -> None:
    plain, hooked = work.train("plain", "--max_train_steps=3"), work.train("hooked", PLAIN, "--max_train_steps=3")
    assert read_parts(plain)[1] == read_parts(hooked)[1]


def test_its_module_is_resumed_exactly(work: Work) -> None:
    whole = work.trainer("whole", PULL).prepare()
    fit(whole)
    wanted = own_hooks.Pull.made[-1].scale.weight.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            work.train("parts", PULL, "--save_every_n_steps=3", "--save_state")
    assert isinstance(own_hooks.Pull.made[-1].closed[0], Stopped)
    resumed = work.train("parts", PULL, "--resume=latest")
    assert torch.equal(own_hooks.Pull.made[-1].scale.weight, wanted)
    assert fingerprint(resumed) == fingerprint(work.folder / "whole" / "lora.safetensors")


def test_a_state_with_weights_of_a_hook_needs_it_before_models_are_loaded(work: Work, monkeypatch) -> None:
    work.train("out", PULL, "--max_train_steps=1", "--save_state")
    state = next((work.folder / "out").glob("*-state"))
    words = [f"--resume={state}", "--max_train_steps=2"]
    with monkeypatch.context() as patch:
        for name in ("load_vae", "load_text_encoders", "load_denoiser"):
            patch.setattr(FluxFamily, name, lambda *_: pytest.fail("a model is loaded"))
        with pytest.raises(ConfigError, match=r"hooks that this run does not have \(first: hook:Pull.scale.weight\)"):
            work.train("other", *words, PLAIN)
    assert not (work.folder / "other").exists()
    assert work.train("other", *words, PULL, PLAIN).is_file()


def test_its_module_learns_alike_in_two_processes(work: Work) -> None:
    """The number that is learned is the one of a single process with twice the batch."""
    work.images = draw_pictures(work.folder / "square", 3)
    words = [PULL, "--t5xxl_max_token_length=32", "--save_state_on_train_end"]
    small = work.dataset(batch_size=1, name="small.toml")
    train_in_two(work, "two", *words, dataset=small)
    work.train("one", *OPTIONS, *words, dataset=work.dataset(batch_size=2, name="large.toml"))
    one_number, two_numbers = (number_in(work.folder / out / "lora-state") for out in ("one", "two"))
    assert one_number != 0 and two_numbers == pytest.approx(one_number, rel=1e-5)
    assert largest_difference(work.folder / "one" / "lora.safetensors", work.folder / "two" / "lora.safetensors") < 1e-5


def number_in(state: Path) -> float:
    return load_safetensors(state / WEIGHTS_FILE)["hook:Pull.scale.weight"].item()


def test_its_options_are_its_opts(work: Work) -> None:
    work.train("out", "--hook=tests.runs.own_hooks:Brief", "--pull_strength=3", "--max_train_steps=1")
    assert own_hooks.Brief.seen[-1] == 3


def test_a_step_that_raises_closes_it(work: Work) -> None:
    with pytest.raises(RuntimeError, match="asked to fail"):
        work.train("out", PULL, "--pull_fails_at=2")
    assert [str(error) for error in own_hooks.Pull.made[-1].closed] == ["asked to fail"]


@pytest.mark.parametrize(("words", "told"), [
    (["--hook=tests.runs.no_such_module:Pull"], "hook is tests.runs.no_such_module:Pull; there is no module tests.runs.no_such_module"),
    (["--hook=tests.runs.own_hooks:Push"], "the module tests.runs.own_hooks has no Push"),
    (["--hook=tests.runs.own_hooks:NOT_A_HOOK"], "which is a value of the type int; needed: package.module:Class"),
    ([PULL, "--pull_strength=-1"], "--pull_strength is -1"),
    ([PULL, "--pull_strenght=1"], "did you mean 'pull_strength'"),
    (["--pull_strength=1"], "unknown option --pull_strength"),
    (["--hook=tests.runs.own_hooks:Picky"], "flux is not what this hook wants"),
    (["--hook=tests.runs.own_hooks:Miscalled"], r"(?s)__init__ is called with \(\), .*compute_loss is called .*on_step_start is called with \(run, batch\),"),
    (["--hook=tests.runs.own_hooks:Clashing"], "Clashing declares --network_dim, which the script has already"),
])  # fmt: skip
def test_what_is_wrong_is_told_at_start(work: Work, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cli.run("flux", "network", work.argv("out", *words))
    assert not (work.folder / "out").exists()


def test_the_help_shows_its_options(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run("flux", "network", [PULL, "--help"])
    shown = capsys.readouterr().out
    assert "Pull towards a number" in shown and "--pull_strength" in shown


def test_methods_that_are_never_called_are_told(work: Work, caplog) -> None:
    from library.training.hooks.base import Hook

    class Misspelled(Hook):
        def on_step_ended(self, run, output): ...

        def on_saved(self, run): ...

        def sate_dict(self): ...

        def _on_step_end(self): ...

        def learn(self): ...

    work.trainer("out", hooks=[Misspelled()]).check()
    told = [record.message for record in caplog.records if "which a run never calls" in record.message]
    assert [line.split()[6].rstrip(",") for line in told] == ["on_step_ended", "on_saved", "sate_dict"]
    assert "did you mean on_step_end?" in told[0] and "on_post_save" in told[1] and "did you mean state_dict?" in told[2]
