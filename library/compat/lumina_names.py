"""Lumina-Image 2.0 by its known calls: loading, guidance, files, samples, options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library import lumina_utils
from library.checkpoints import lumina_convert
from library.compat.arguments import add_groups
from library.compat.networks import KnownNetwork, row, shared_pairs
from library.compat.samples import Replacement, refuse_control_net, sample_family
from library.components import gemma_encoder_utils
from library.components.ldm_models import AutoEncoder
from library.core.registry import import_target
from library.families.registry import record_of
from library.generation.lumina_options import LuminaRequest
from library.generation.lumina_pipeline import LuminaPipeline
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS
from library.lumina_models import NextDiT
from library.training.timestep_samplers import TimestepOptions
from networks.lora import LoRAModule


def load_lumina_model(
    ckpt_path: str | os.PathLike, dtype: torch.dtype | None, device: str | torch.device, disable_mmap: bool = False,
    use_flash_attn: bool = False, use_sage_attn: bool = False,
) -> NextDiT:
    """The denoiser; the two kinds of attention are ways with equal results and change nothing."""
    return lumina_utils.load_lumina(ckpt_path, dtype, device, disable_mmap)


def load_ae(
    ckpt_path: str | os.PathLike, dtype: torch.dtype | None, device: str | torch.device, disable_mmap: bool = False
) -> AutoEncoder:
    return lumina_utils.load_ae(ckpt_path, dtype, device, disable_mmap)


def load_gemma2(
    ckpt_path: str | os.PathLike | None, dtype: torch.dtype | None, device: str | torch.device,
    disable_mmap: bool = False, state_dict: Mapping[str, Tensor] | None = None,
) -> Any:
    """The text encoder of a file, or of tensors in memory."""
    return gemma_encoder_utils.load_gemma2(ckpt_path if state_dict is None else state_dict, dtype, device, disable_mmap)


def convert_diffusers_sd_to_alpha_vllm(sd: Mapping[str, Tensor], num_double_blocks: int) -> dict[str, Tensor]:
    """A denoiser under the names of its original files; the number of blocks follows from the names."""
    return lumina_convert.to_original(sd) if lumina_convert.is_diffusers_denoiser(sd) else dict(sd)


def get_lin_function(x1: float = 256, x2: float = 4096, y1: float = 0.5, y2: float = 1.15) -> Callable[[float], float]:
    """The line through (x1, y1) and (x2, y2); in this order here."""
    return lambda x: y1 + (y2 - y1) / (x2 - x1) * (x - x1)


@torch.no_grad()
def denoise(
    scheduler: Any, model: NextDiT, img: Tensor, txt: Tensor, txt_mask: Tensor, neg_txt: Tensor, neg_txt_mask: Tensor,
    timesteps: Sequence[float] | Tensor, guidance_scale: float = 4.0, cfg_trunc_ratio: float = 0.25,
    renorm_cfg: float = 1.0,
) -> Tensor:
    """Steps of `scheduler` (`step(velocity, timestep, latents, return_dict=False)`, velocity = noise - data) on latents
    [B, C, h, w] along `timesteps` on the 0..1000 scale, guided as pictures of the family are."""
    request = LuminaRequest(
        prompt="", width=0, height=0, steps=len(timesteps), cfg_scale=guidance_scale, cfg_trunc_ratio=cfg_trunc_ratio,
        renorm_cfg=renorm_cfg,
    )  # fmt: skip
    positive, negative = (
        {"hidden_state": states, "attention_mask": mask}
        for states, mask in ((txt, txt_mask), (neg_txt, neg_txt_mask))
    )
    velocity = LuminaPipeline(model, None).guided(request, positive, negative)
    for timestep in timesteps:
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=img.device) / NUM_TRAIN_TIMESTEPS
        img = scheduler.step(velocity(img, sigma), timestep, img, return_dict=False)[0]
    return img


class LoRANetwork(KnownNetwork):
    """LoRA of Lumina-Image 2.0."""

    PARTS = ("attn_dim", "mlp_dim", "mod_dim", "refiner_dim")

    def __init__(
        self, text_encoders: Any, unet: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float | None = 1,
        dropout: float | None = None, rank_dropout: float | None = None, module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None, module_class: type = LoRAModule, modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, float] | None = None, train_blocks: str | None = None,
        type_dims: Sequence[int | None] | None = None, embedder_dims: Sequence[int] | None = None,
        verbose: bool = False,
    ) -> None:
        """`type_dims` in the order of PARTS."""
        pairs = {
            **shared_pairs(rank_dropout, module_dropout, conv_lora_dim, conv_alpha, verbose),
            "train_blocks": train_blocks, "embedder_dims": row(embedder_dims),
            **dict(zip(self.PARTS, type_dims or ())),
        }
        self.build(
            text_encoders, unet, multiplier, lora_dim, alpha, dropout, pairs, module_class, modules_dim, modules_alpha
        )


def save_models(
    ckpt_path: str, lumina: NextDiT, sai_metadata: Mapping[str, str] | None, save_dtype: torch.dtype | None = None,
    use_mem_eff_save: bool = False,
) -> None:
    """Write the denoiser; a file is always written tensor by tensor."""
    lumina_utils.save_lumina(lumina, ckpt_path, save_dtype, dict(sai_metadata or {}))


def sample_images(
    accelerator: Any, args: Any, epoch: int | None, global_step: int, nextdit: Any, vae: Any, gemma2_model: Any,
    sample_prompts_gemma2_outputs: Any, prompt_replacement: Replacement | None = None, controlnet: Any = None,
) -> None:
    """The samples where they are due; `sample_prompts_gemma2_outputs` (text -> list of outputs) spares the text
    encoder."""
    refuse_control_net(controlnet)
    sample_family(
        "lumina", accelerator, args, epoch, global_step, vae, nextdit, gemma2_model, None,
        sample_prompts_gemma2_outputs, prompt_replacement,
    )  # fmt: skip


def add_lumina_train_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, import_target(record_of("lumina").family).options, TimestepOptions)
