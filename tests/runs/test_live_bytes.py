"""What an update inside the backward pass saves: bytes of living tensors in a step of a whole FLUX.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training import loop
from library.training.updaters.base import trained_parameters
from tests.families import CASES
from tests.runs.conftest import draw_pictures
from tests.runs.families import FamilyWork
from tests.runs.live_bytes import LiveBytes
from tests.runs.test_whole_models import train
from tests.tiny import build_tiny_flux

WORDS = (
    "--max_train_steps=2", "--gradient_checkpointing", "--cache_latents", "--cache_text_encoder_outputs",
    "--t5xxl_max_token_length=8", "--max_grad_norm=0",
    "--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False",
)  # fmt: skip
"""weights that are many and activations that are few, as in real models"""


def test_a_fused_step_saves_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the largest, which is there when its weight is stepped, and a few activations."""
    tiny = build_tiny_flux(tmp_path / "tiny", hidden=128)
    work = FamilyWork(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASES["flux"])
    one_at_a_time = work.dataset(batch_size=1)
    monkeypatch.setattr(work, "dataset", lambda **_: one_at_a_time)
    plain, sizes = peak_of_a_step(work, "plain", monkeypatch)
    fused, _ = peak_of_a_step(work, "fused", monkeypatch, "--fused_backward_pass")
    assert 0.98 * sum(sizes) - max(sizes) < plain - fused <= sum(sizes)
    assert plain > 2 * sum(sizes) > fused  # weights and gradients at least; weights and less than as much


def peak_of_a_step(
    work: FamilyWork, out: str, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[int, list[int]]:
    """(most living bytes in the second step, when the optimizer's state is there, those of each weight)."""
    micro_step, update = loop.micro_step, loop.update
    live, sizes = LiveBytes(), []

    def watched_step(run, batch):
        live.restart()
        with live:
            return micro_step(run, batch)

    def watched_update(run):
        with live:
            update(run)
        sizes[:] = [p.numel() * p.element_size() for p in trained_parameters(run.optimizer)]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "micro_step", watched_step)
        patch.setattr(loop, "update", watched_update)
        train(work, "full", out, *WORDS, *more)
    return live.peak, sizes
