"""What happens around the steps (samples, validation, files, logs, caches) leaves the training as it is, to the
byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs.conftest import Stopped, Work, draw_pictures, fingerprint, read_parts, stop_after

BRIEF = "--t5xxl_max_token_length=32"
"""most of the time of such a small model goes into padding"""
DROPOUTS = [BRIEF, "--network_args", "rank_dropout=0.1", "module_dropout=0.1"]
PROMPTS = "a red cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny) -> Work:
    """A folder with the result of a run with nothing around its steps, under the name `plain`."""
    folder = tmp_path_factory.mktemp("plain")
    work = Work(folder, tiny, draw_pictures(folder / "images", -9))
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    work.train("plain", *DROPOUTS, dataset=shuffled(work))
    return work


def shuffled(work: Work) -> Path:
    return work.dataset(subset_keys="shuffle_caption = true\nflip_aug = true\ncaption_dropout_rate = 0.2")


AROUND = {
    "samples": ["--sample_prompts={folder}/prompts.txt", "--sample_every_n_steps=2", "--sample_at_first"],
    "files": ["--save_every_n_steps=1", "--save_every_n_epochs=1", "--save_state"],
    "logs": ["--logging_dir={folder}/log", "--log_with=tensorboard", "--console_log_level=DEBUG"],
}


@pytest.mark.parametrize("name", AROUND)
def test_what_surrounds_the_steps_changes_no_byte(plain: Work, name: str) -> None:
    options = [option.format(folder=plain.folder) for option in AROUND[name]]
    other = plain.train(name, *DROPOUTS, *options, dataset=shuffled(plain))
    assert fingerprint(other) == fingerprint(plain.folder / "plain" / "lora.safetensors")


def test_validation_changes_no_weight(work: Work) -> None:
    """Its options are recorded in the file, so that the weights alone are compared."""
    data = work.dataset(dataset_keys="validation_split = 0.3\nvalidation_seed = 3")
    seldom = work.train("seldom", *DROPOUTS, "--validate_every_n_epochs=9", dataset=data)
    often = work.train("often", *DROPOUTS, "--validate_every_n_steps=1", dataset=data)
    assert read_parts(seldom)[1] == read_parts(often)[1]


class AveragingSGD(torch.optim.SGD):
    """A schedule-free method: gradients are taken between the fast weights and their average, which is the result. As
    with the published ones, switching from one to the other and back rounds."""

    beta = 0.9

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.is_switched = False

    def _move(self, weight: float) -> None:
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"]):
                if "fast" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["fast"], weight)

    def eval(self) -> None:
        if not self.is_switched:
            self._move(1 - 1 / self.beta)
        self.is_switched = True

    def train(self) -> None:
        if self.is_switched:
            self._move(1 - self.beta)
        self.is_switched = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert not self.is_switched
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    fast = self.state[parameter].setdefault("fast", parameter.detach().clone())
                    parameter.lerp_(fast, 0.3)
                    parameter.sub_(parameter.grad, alpha=group["lr"] * 0.1)
                    fast.sub_(parameter.grad, alpha=group["lr"])


def test_saving_and_sampling_with_a_schedule_free_optimizer(plain: Work) -> None:
    options = [BRIEF, "--optimizer_type=tests.runs.test_no_side_effects.AveragingSGD"]
    whole = plain.train("free", *options)
    sampling = [option.format(folder=plain.folder) for option in AROUND["samples"]]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            plain.train("stopped", *options, *AROUND["files"], *sampling)
    state = plain.folder / "stopped" / "lora-step00000004-state"
    assert fingerprint(plain.train("resumed", *options, f"--resume={state}")) == fingerprint(whole)


def test_latents_are_the_same_from_the_step_from_memory_and_from_files(work: Work) -> None:
    """Whatever is encoded together: the number of images in a batch of the VAE changes nothing either."""
    data = work.dataset(subset_keys="flip_aug = true")
    caching = {
        "memory": ["--cache_latents"],
        "batches": ["--cache_latents", "--vae_batch_size=4"],
        "files": ["--cache_latents_to_disk"],
    }
    live = read_parts(work.train("live", BRIEF, dataset=data))[1]
    for name, options in caching.items():
        assert read_parts(work.train(name, BRIEF, *options, dataset=data))[1] == live, name


def test_text_outputs_are_the_same_from_the_step_from_memory_and_from_files(work: Work) -> None:
    """CLIP-L learns, so that beside a cache it still runs in the step."""
    live, memory, files = (
        work.train(name, *options)
        for name, options in (
            ("live", []), ("memory", ["--cache_text_encoder_outputs", "--text_encoder_batch_size=4"]),
            ("files", ["--cache_text_encoder_outputs_to_disk"]),
        )
    )  # fmt: skip
    assert read_parts(live)[1] == read_parts(memory)[1] == read_parts(files)[1]
