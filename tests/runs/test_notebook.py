"""`import library` and `library.Training`: what a notebook has in its hands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import library
from library.core.errors import ConfigError
from library.training.hooks.base import Hook
from library.training.notebook import words_of
from tests.runs.conftest import Work, read_parts
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_imports_nothing_heavy_and_knows_its_names() -> None:
    code = (
        "import sys, library\n"
        "assert 'torch' not in sys.modules\n"
        "registries = [library.LOSSES, library.LOSS_WEIGHTS, library.TIMESTEP_SAMPLERS, library.INFERENCE_SAMPLERS, "
        "library.SCHEDULERS,\n"
        "              library.OPTIMIZERS, library.TRAINABLES, library.Training, library.Hook, "
        "library.register_family, library.option]\n"
        "assert 'torch' not in sys.modules and all(registries)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_package_is_there() -> None:
    assert all(getattr(library, name) is not None for name in dir(library))
    with pytest.raises(AttributeError, match="module 'library' has no attribute 'Trainning'"):
        library.Trainning  # noqa: B018


def test_options_become_words() -> None:
    options = {"network_dim": 4, "cache_latents": True, "betas": [0.9, 0.99], "vae": None, "output_dir": Path("out")}
    assert words_of(options) == [
        "--network_dim=4",
        "--cache_latents=True",
        "--betas",
        "0.9",
        "0.99",
        "--output_dir=out",
    ]
    assert words_of(["--seed", 1]) == ["--seed", "1"]


def test_it_trains_as_the_script_does(work: Work) -> None:
    script = work.train("script")
    training = library.Training(work.argv("notebook"), family="flux")
    assert len(training.dataset.items) == 9
    path = training.train()
    assert path == work.folder / "notebook" / "lora.safetensors"
    assert read_parts(path)[1] == read_parts(script)[1]


def test_a_step_learns_over_the_ends_of_epochs(work: Work) -> None:
    training = library.Training(work.argv("steps"), family="flux", gradient_accumulation_steps=2, learning_rate=1e-1)
    run = training.run
    learned = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    values = [parameter.detach().clone() for parameter in learned]
    losses = [training.step().loss.item() for _ in range(4)]
    assert len(set(losses)) == 4 and any((now != then).any() for now, then in zip(learned, values))
    assert run.progress.global_step == 0
    training.close()
    again = library.Training(work.argv("steps"), family="flux")  # the name of the output is free
    assert again.run is not None
    again.close()


def test_hooks_and_formulas_of_a_cell_are_used(work: Work) -> None:
    seen = []

    class Counting(Hook):
        def on_step_end(self, *_):
            seen.append(1)

    library.LOSSES.register("notebook_loss")(notebook_loss)
    library.LOSSES.register("notebook_loss")(notebook_loss)
    training = library.Training(
        work.argv("cell"), family="flux", loss_type="notebook_loss", max_train_steps=2, hooks=[Counting()]
    )
    assert read_parts(training.train())[1] != read_parts(work.train("plain", "--max_train_steps=2"))[1]
    assert len(seen) == 2


def notebook_loss(options, prediction, target, timesteps, objective):
    return (prediction.float() - target.float()).abs() ** 1.5


def test_wrong_options_are_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        library.Training(family="flux", network_dmi=4, loss_type="l3")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="unknown model family 'flex'; did you mean 'flux'"):
        library.Training(family="flex")
