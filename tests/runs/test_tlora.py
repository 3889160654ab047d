"""T-LoRA in real training steps: every sample of a batch has the ranks of its own time; images and files have all of
them."""

from __future__ import annotations

import math

import pytest
import torch

from library.core.errors import ConfigError
from library.training.objective import DdpmObjective, FlowMatchingObjective
from networks.files.network_files import read_adapter_file
from networks.tlora import TLoRAModule
from tests.runs.conftest import Work
from tests.runs.families import Tinies

RANK, LEAST = 8, 2
OPTIONS = (
    "--network_module=tlora",
    f"--network_dim={RANK}",
    "--network_args",
    f"tlora_min_rank={LEAST}",
    "tlora_alpha_rank_scale=2",
)
FAMILIES = ("flux", "sd")


@pytest.fixture(scope="module")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


def ranks_at(time: float) -> int:
    return math.floor((1 - time) ** 2 * (RANK - LEAST)) + LEAST


def watched_run(
    work: Work, monkeypatch: pytest.MonkeyPatch, *more: str
) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Train; per micro-batch the times of its samples (0 = data, 1 = noise) as they were noised, and per layer [B,
    rank] which ranks went into the up matrix of each sample."""
    steps: list[tuple[list[float], dict[str, torch.Tensor]]] = []

    def watched(original):
        def corrupt(self, *inputs):
            sample = original(self, *inputs)
            steps.append(((sample.timesteps / 1000).tolist(), {}))
            return sample

        return corrupt

    for objective in (FlowMatchingObjective, DdpmObjective):
        monkeypatch.setattr(objective, "corrupt", watched(objective.corrupt))
    original_drop = TLoRAModule._dropped

    def dropped(self, hidden, part):
        masked = original_drop(self, hidden, part)
        times, layers = steps[-1]
        by_rank = masked.detach().movedim(1, -1) if self.is_conv else masked.detach()
        layers[self.lora_name] = by_rank.reshape(len(times), -1, RANK).abs().amax(dim=1) > 0
        return masked

    monkeypatch.setattr(TLoRAModule, "_dropped", dropped)
    work.train("out", *OPTIONS, *more)
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sample_of_a_batch_has_the_ranks_of_its_time(tinies, family, tmp_path, monkeypatch) -> None:
    work = tinies.work(family, tmp_path)
    steps = watched_run(work, monkeypatch, "--max_train_steps=4", "--gradient_accumulation_steps=2")
    counts = set()
    for times, layers in steps:
        assert layers
        for name, used in layers.items():
            for row, time in zip(used, times, strict=True):
                count = ranks_at(time)
                counts.add(count)
                assert row.tolist() == [index < count for index in range(RANK)], (name, time)
    assert any(len({ranks_at(time) for time in times}) > 1 for times, _ in steps)  # different ranks within one batch
    assert len(counts) > 2
    file = read_adapter_file(tmp_path / "out" / "lora.safetensors")
    assert {tensor.shape[0] for name, tensor in file.items() if name.endswith("lora_down.weight")} == {RANK}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_run_and_caches_change_nothing(tinies, family, tmp_path) -> None:
    work = tinies.work(family, tmp_path)
    whole = read_adapter_file(work.train("whole", *OPTIONS, "--max_train_steps=4"))
    work.train("first", *OPTIONS, "--max_train_steps=2", "--save_state")
    state = f"--resume={tmp_path / 'first' / 'lora-state'}"
    resumed = read_adapter_file(work.train("resumed", *OPTIONS, "--max_train_steps=4", state))
    cached = read_adapter_file(work.train("cached", *OPTIONS, "--max_train_steps=4", "--cache_latents"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
        torch.testing.assert_close(cached[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_plain_lora_of_the_same_rank_learns_something_else(tinies, tmp_path) -> None:
    work = tinies.work("flux", tmp_path)
    own = read_adapter_file(work.train("own", *OPTIONS, "--max_train_steps=2"))
    plain = read_adapter_file(
        work.train("plain", "--network_module=lora", f"--network_dim={RANK}", "--max_train_steps=2")
    )
    assert set(own) == set(plain)
    assert any(not torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.parametrize(("pairs", "message"), [
    (["tlora_min_rank=8"], "no rank would depend on time"),
    (["tlora_min_rank=0"], "1 or more"),
    (["tlora_alpha_rank_scale=0"], "above 0"),
    (["tlora_use_ortho=True"], "cannot be read back from a file of LoRA"),
])  # fmt: skip
def test_bad_arguments_are_refused(tinies, tmp_path, pairs, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tinies.work("flux", tmp_path).train(
            "out", "--network_module=tlora", f"--network_dim={RANK}", "--max_train_steps=1", "--network_args", *pairs
        )


class TokenTimes:
    """A time for every token: uniform, and half of the tokens at most at half of the noise."""

    def __init__(self, options) -> None: ...

    def sample(self, latent_shape, draws):
        tokens = latent_shape[-1] * latent_shape[-2] // 4
        times = draws.uniform("times of tokens", (tokens,))
        return torch.cat([times[:, : tokens // 2] / 2, times[:, tokens // 2 :]], dim=1)


def test_of_times_per_token_the_noisiest_counts(tinies, tmp_path, monkeypatch) -> None:
    work = tinies.work("flux", tmp_path)
    steps = watched_run(work, monkeypatch, "--max_train_steps=2", f"--timestep_sampling={__name__}:TokenTimes")
    checked = 0
    for times, layers in steps:
        for used in layers.values():
            for row, of_tokens in zip(used, times, strict=True):
                assert len(of_tokens) > 1
                assert row.sum() == ranks_at(max(of_tokens))
                checked += 1
    assert checked
