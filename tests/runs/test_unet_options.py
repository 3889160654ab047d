"""Options of Stable Diffusion and SDXL that no other test tries in a run: each changes the loss, or changes nothing but
how the same loss is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.pairwise import Each, denoiser
from tests.runs.conftest import losses_of
from tests.runs.families import FamilyWork, Tinies
from tests.tiny_sd import build_tiny_sd

OBJECTIVE = [
    "--v_parameterization", "--v_parameterization --scale_v_pred_loss_like_noise_pred",
    "--v_parameterization --zero_terminal_snr",
    "--v_parameterization --min_snr_gamma=0.01", "--v_pred_like_loss=0.5", "--debiased_estimation_loss",
    "--noise_offset=0.3",
    "--noise_offset=0.3 --noise_offset_random_strength", "--noise_offset=0.3 --adaptive_noise_scale=0.5",
    "--multires_noise_iterations=3",
    "--multires_noise_iterations=3 --multires_noise_discount=0.8", "--ip_noise_gamma=0.5",
    "--ip_noise_gamma=0.5 --ip_noise_gamma_random_strength", "--loss_type=l1", "--loss_type=huber",
    "--loss_type=smooth_l1",
    "--loss_type=huber --huber_schedule=constant", "--loss_type=huber --huber_c=0.5",
    "--loss_type=huber --huber_scale=2",
    "--max_timestep=100", "--min_timestep=900", "--seed=8",
]  # fmt: skip
"""What both families take from the same noise schedule: SDXL, which takes twice as long, tries one of them."""
CHANGING = [
    "--max_token_length=150", "--max_token_length=225", "--mixed_precision=bf16",
    "--mixed_precision=bf16 --fp8_base", "--mixed_precision=bf16 --fp8_base_unet", "--mixed_precision=bf16 --full_bf16",
    "--mixed_precision=bf16 --no_half_vae", "--vae={vae}", "--caption_dropout_rate=1",
    "--network_args conv_dim=2", "--clip_skip=2",
]  # fmt: skip
EQUAL = [
    "--gradient_checkpointing", "--gradient_checkpointing --cpu_offload_checkpointing",
    "--cache_latents --vae_batch_size=2",
    "--disable_mmap_load_safetensors", "--xformers --mem_eff_attn --sdpa", "--noise_offset=0 --min_snr_gamma=0",
]  # fmt: skip


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def losses(request, tmp_path_factory) -> Callable[[str], list[float]]:
    """Options -> the losses of two steps, on captions of more than 150 tokens."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    work: FamilyWork = Tinies(tmp_path_factory).work(family, folder)
    for path in work.images.glob("*.txt"):
        path.write_text("a red cat, " + "photo girl circle " * 60, encoding="utf-8")
    vae = build_tiny_sd(folder / "other", "sdxl" if family == "sdxl" else "sd1", seed=9).model
    known: dict[str, list[float]] = {}

    def run(options: str) -> list[float]:
        if family == "sdxl" and "--clip_skip" in options:
            pytest.skip("SDXL has one place to take its states from")
        if options not in known:
            out = f"run{len(known)}"
            known[options] = losses_of(
                work.train(
                    out,
                    "--max_train_steps=2",
                    *options.format(vae=vae).split(),
                    dataset=work.dataset(name=f"{out}.toml"),
                )
            )
        return known[options]

    return run


@pytest.mark.cross_product("options", denoiser("losses"), Each("losses"))
@pytest.mark.parametrize("options", OBJECTIVE)
def test_what_changes_noise_and_loss(losses, options: str) -> None:
    assert_that_each_word_tells(losses, options)


@pytest.mark.parametrize("options", CHANGING)
def test_what_changes_the_loss(losses, options: str) -> None:
    assert_that_each_word_tells(losses, options)


def assert_that_each_word_tells(losses: Callable[[str], list[float]], options: str) -> None:
    assert losses(options) != losses("")
    without_last = " ".join(options.split()[:-1])
    if without_last and not without_last.endswith("--network_args"):
        assert losses(options) != losses(without_last)


@pytest.mark.parametrize("options", EQUAL)
def test_what_leaves_the_loss_as_it_is(losses, options: str) -> None:
    assert losses(options) == pytest.approx(losses(""), rel=1e-5)
