"""What is in memory when: parts of the model are released after their last use."""

from __future__ import annotations

import gc

import pytest
import torch

from library.training.hooks.losses import LossReader
from library.training.wiring.flux import FluxFamily
from tests.runs.conftest import Work


def live_text_encoders() -> int:
    """Parameters of text encoders that something still refers to."""
    from transformers import PreTrainedModel

    gc.collect()
    models = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel)]
    parameters = {id(p): p for model in models for p in model.parameters() if p.device.type != "meta"}
    return sum(p.numel() for p in parameters.values())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts live text-encoder parameters when the denoiser is loaded, and after the first step."""
    counts: dict[str, int] = {}
    load_denoiser, step_of = FluxFamily.load_denoiser, LossReader.on_step_end

    def loading(self, runtime):
        counts["before the denoiser"] = live_text_encoders()
        return load_denoiser(self, runtime)

    def stepping(self, run, output):
        counts.setdefault("in training", live_text_encoders())
        assert sum(p.numel() for p in run.models.denoiser.parameters()) > 0
        return step_of(self, run, output)

    monkeypatch.setattr(FluxFamily, "load_denoiser", loading)
    monkeypatch.setattr(LossReader, "on_step_end", stepping)
    return counts


@pytest.mark.parametrize("where", ["", "_to_disk"])
def test_with_cached_outputs_text_encoders_are_gone_before_the_denoiser_comes(
    work: Work, seen: dict[str, int], where: str
) -> None:
    before = live_text_encoders()
    work.train("out", f"--cache_text_encoder_outputs{where}", "--network_train_unet_only", "--max_train_steps=1")
    assert seen == {"before the denoiser": before, "in training": before}


def test_text_encoders_that_run_in_the_step_stay(work: Work, seen: dict[str, int]) -> None:
    before = live_text_encoders()
    work.train("out", "--network_train_unet_only", "--max_train_steps=1")
    assert seen["before the denoiser"] > before and seen["in training"] > before


def test_beside_a_cache_only_the_encoder_that_learns_stays(work: Work, seen: dict[str, int]) -> None:
    before = live_text_encoders()
    work.train("cached", "--cache_text_encoder_outputs", "--max_train_steps=1")
    partial = seen["in training"] - before
    seen.clear()
    work.train("live", "--max_train_steps=1")
    assert 0 < partial < seen["in training"] - before


def test_a_filled_cache_loads_no_text_encoder(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--cache_text_encoder_outputs_to_disk",
        "--cache_latents_to_disk",
        "--network_train_unet_only",
        "--max_train_steps=1",
    ]
    work.train("first", *options)

    def must_not(self, runtime):
        raise AssertionError("loaded")

    monkeypatch.setattr(FluxFamily, "load_text_encoders", must_not)
    monkeypatch.setattr(FluxFamily, "load_vae", must_not)
    work.train("second", *options)
    assert torch.is_grad_enabled()
