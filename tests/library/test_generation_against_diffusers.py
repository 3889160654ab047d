"""gen_img.py against the pipelines of diffusers on the same weights and noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.generation.gen_img import batches
from library.generation.gen_img import script as unet_inference
from library.generation.sampling_utils import start_noise
from tests.library.test_sdxl_inference import reference_pipeline
from tests.tiny import write_clip_tokenizer

diffusers = pytest.importorskip("diffusers")

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1),
    "pndm": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=False, set_alpha_to_one=False, steps_offset=1),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
    "dpmsolver++": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++"),
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """(folder, pipeline) of a small Stable Diffusion 1 with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("reference")
    vocab = write_clip_tokenizer(folder / "plain")
    torch.manual_seed(8)
    text = CLIPTextConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="quick_gelu",
        bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, cross_attention_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.18215,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(
        str(folder / "plain/vocab.json"),
        str(folder / "plain/merges.txt"),
        model_max_length=77,
        pad_token="<|endoftext|>",
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=SCHEDULERS["ddim"](),
        safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


def our_latents(monkeypatch, *arguments: str) -> torch.Tensor:
    """The latents that the script decodes."""
    seen = []
    real = batches.PictureBatches._decoded

    def watched(self, latents):
        seen.append(latents)
        return real(self, latents)

    monkeypatch.setattr(batches.PictureBatches, "_decoded", watched)
    unet_inference.run(arguments)
    [latents] = seen
    return latents


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def where(folder: Path) -> list[str]:
    return [f"--ckpt={folder / 'model'}", f"--clip_tokenizer={folder / 'plain'}", f"--outdir={folder / 'out'}"]


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_stable_diffusion(stable_diffusion, monkeypatch, sampler):
    folder, reference = stable_diffusion
    reference.scheduler = SCHEDULERS[sampler]()
    noise = start_noise(5, 4, 8, 12)
    expected = reference(
        "a red cat", negative_prompt="blue", height=64, width=96, num_inference_steps=20, guidance_scale=6.0,
        latents=noise, output_type="latent"
    ).images
    line = "a red cat --n blue --w 96 --h 64 --l 6 --d 5"
    result = our_latents(monkeypatch, *where(folder), "--prompt", line, "--steps=20", f"--sampler={sampler}")
    assert relative(result, expected) < 1e-4


def test_sdxl_with_its_sizes(tmp_path, monkeypatch):
    reference = reference_pipeline(tmp_path)
    noise = start_noise(5, 4, 8, 12)
    expected = reference(
        "a red cat", negative_prompt="blue", height=64, width=96, num_inference_steps=5, guidance_scale=6.0,
        latents=noise, output_type="latent",
        original_size=(128, 256), crops_coords_top_left=(8, 16), target_size=(64, 96), negative_original_size=(32, 40),
        negative_crops_coords_top_left=(8, 16), negative_target_size=(64, 96),
    ).images  # fmt: skip
    line = "a red cat --n blue --w 96 --h 64 --l 6 --d 5 --oh 128 --ow 256 --ct 8 --cl 16 --nh 32 --nw 40"
    result = our_latents(monkeypatch, *where(tmp_path), "--sdxl", "--prompt", line, "--steps=5", "--sampler=euler")
    assert relative(result, expected) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_img2img(stable_diffusion, monkeypatch, tmp_path, sampler):
    """Without the offset of steps, which diffusers' own pipeline does not have."""
    from PIL import Image

    from library.core.keyed_random import keyed_generator

    folder, pipeline = stable_diffusion
    source = tmp_path / "source.png"
    Image.effect_mandelbrot((96, 64), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB").save(source)
    seen = []
    real = batches.PictureBatches._source_latents

    def watched(self, requests):
        seen.append(real(self, requests))
        return seen[-1]

    monkeypatch.setattr(batches.PictureBatches, "_source_latents", watched)
    line = "a red cat --n blue --l 6 --d 5 --t 0.65"
    result = our_latents(
        monkeypatch, *where(folder), "--prompt", line, "--steps=10", f"--sampler={sampler}", "--image_path",
        str(source), "--force_scheduler_zero_steps_offset"
    )
    schedulers = {
        "ddim": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=0),
        "euler": diffusers.EulerDiscreteScheduler(**BETAS),
    }
    reference = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    reference.scheduler = schedulers[sampler]  # afterwards: the pipeline changes the offset of the one it is given
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a red cat", image=seen[0], negative_prompt="blue", num_inference_steps=10, strength=0.65, guidance_scale=6.0,
        output_type="latent",
        generator=keyed_generator(5, "img2img noise"),
    ).images  # fmt: skip
    assert relative(result, expected) < 1e-4
