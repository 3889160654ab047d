"""HunyuanImage 2.1 by its known calls: loading, texts to what the denoiser reads, the schedule, samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library import strategy_hunyuan_image as texts
from library.checkpoints.loading import build_on_meta
from library.checkpoints.weight_forms import FP8_SCALED
from library.compat.networks import KnownNetwork, merging, shared_pairs
from library.compat.samples import Replacement, sample_family
from library.components.llm_encoder_utils import load_qwen25_vl
from library.components.text_encoder_utils import load_t5xxl
from library.components.tokenizers import load_qwen25_vl_tokenizer
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_utils import load_hunyuan_image
from library.hunyuan_image_utils import load_vae as load_own_vae
from library.hunyuan_image_vae import HunyuanVAE2D
from library.training.inference_samplers.flow import flow_schedule
from networks.lora import LoRAModule
from networks.lora_hunyuan_image import TARGETS

MODEL_VERSION_2_1 = "hunyuan-image-2.1"


# -- loading -----------------------------------------------------------------------------------------------------------


def load_hunyuan_image_model(
    device: str | torch.device, dit_path: str | os.PathLike, attn_mode: str, split_attn: bool,
    loading_device: str | torch.device, dit_weight_dtype: torch.dtype | None, fp8_scaled: bool = False,
    lora_weights_list: Sequence[Mapping[str, Tensor]] | None = None, lora_multipliers: Sequence[float] | None = None,
) -> HYImageDiffusionTransformer:
    """The denoiser on `loading_device`, with adapters merged. `attn_mode` and `split_attn` choose among ways with equal
    results and change nothing; `fp8_scaled` keeps the matrices of the blocks in 8 bits."""
    transform = merging(TARGETS, lora_weights_list, lora_multipliers)
    return load_hunyuan_image(
        dit_path, dit_weight_dtype, loading_device, form=FP8_SCALED if fp8_scaled else None, transform=transform
    )  # fmt: skip


def create_model(attn_mode: str, split_attn: bool, dtype: torch.dtype | None) -> HYImageDiffusionTransformer:
    """A denoiser of the size of HunyuanImage 2.1 on the meta device."""
    model = build_on_meta(lambda: HYImageDiffusionTransformer(HYImageParams()))
    return model if dtype is None else model.to(dtype)


def load_vae(
    vae_path: str | os.PathLike, device: str | torch.device, disable_mmap: bool = False, chunk_size: int | None = None
) -> HunyuanVAE2D:
    """The autoencoder in the number format of its file; `chunk_size`: rows that it computes at once."""
    return load_own_vae(vae_path, None, device, disable_mmap, chunk_size=chunk_size)


def load_qwen2_5_vl(
    ckpt_path: str | os.PathLike | None, dtype: torch.dtype | None, device: str | torch.device,
    disable_mmap: bool = False, state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of a file or folder, or of tensors in memory. The tokenizer is that of the folder, or
    of the hub."""
    source = ckpt_path if state_dict is None else state_dict
    folder = None if ckpt_path is None else os.fspath(ckpt_path)
    return load_qwen25_vl_tokenizer(None, None, folder), load_qwen25_vl(source, dtype, device, disable_mmap)


def load_byt5(
    ckpt_path: str | os.PathLike | None, dtype: torch.dtype | None, device: str | torch.device,
    disable_mmap: bool = False, state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[Any, Any]:
    """(tokenizer, glyph encoder) of a file, or of tensors in memory. The tokenizer reads bytes and needs no files."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0), load_t5xxl(ckpt_path, dtype, device, disable_mmap, state_dict)


# -- texts -------------------------------------------------------------------------------------------------------------


def get_qwen_tokens(tokenizer: Any, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, L] of prompts in the template, padded to the longest."""
    ids, mask, _, _ = _strategy(tokenizer).tokenize(_listed(prompt))
    return ids, mask


def get_qwen_prompt_embeds_from_tokens(vlm: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(states [B, L', D], mask [B, L']) without the 34 tokens of the template's head, as Qwen2.5-VL's own tokenizer
    counts them."""
    return _without_head(vlm, input_ids, attention_mask, HEAD_TOKENS)


def get_qwen_prompt_embeds(tokenizer: Any, vlm: Any, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """(states [B, L', D], mask [B, L']) of prompts, without the template's head."""
    strategy = _strategy(tokenizer)
    ids, mask, _, _ = strategy.tokenize(_listed(prompt))
    return _without_head(vlm, ids, mask, strategy.num_head)


def get_byt5_text_tokens(tokenizer: Any, max_length: int, text_list: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, max_length] of glyph texts (`Text "...". `), which are cut to that length."""
    read = tokenizer(
        _listed(text_list), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    )
    return read.input_ids, read.attention_mask


def get_byt5_prompt_embeds_from_tokens(
    text_encoder: Any, input_ids: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(states [B, G, E], mask [B, G]); states are 0 where the mask is."""
    return _states(text_encoder, input_ids, text_mask, lambda rows: text_encoder(rows).last_hidden_state), text_mask


def get_glyph_prompt_embeds(
    tokenizer: Any, text_encoder: Any, prompt: str | Sequence[str] | None = None
) -> tuple[list[bool], Tensor, Tensor]:
    """(whether each prompt quotes a text, states [B, 128, E], mask [B, 128]). The mask is 0 where nothing is quoted,
    whatever the other prompts of the batch quote."""
    glyphs = [texts.glyph_text(text) for text in _listed(prompt or "")]
    ids, mask = get_byt5_text_tokens(tokenizer, texts.GLYPH_LENGTH, glyphs)
    has_text = [bool(text) for text in glyphs]
    mask = mask * torch.tensor(has_text)[:, None]
    return has_text, *get_byt5_prompt_embeds_from_tokens(text_encoder, ids, mask)


HEAD_TOKENS = 34


def _strategy(tokenizer: Any) -> texts.HunyuanImageTokenizeStrategy:
    return texts.HunyuanImageTokenizeStrategy(tokenizer=tokenizer)


def _listed(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _without_head(vlm: Any, ids: Tensor, mask: Tensor, head: int) -> tuple[Tensor, Tensor]:
    states = _states(
        vlm, ids, mask, lambda rows: vlm(rows, output_hidden_states=True).hidden_states[texts.HIDDEN_LAYER]
    )
    return states[:, head:], mask[:, head:]


@torch.no_grad()
def _states(model: Any, ids: Tensor, mask: Tensor, encode: Any) -> Tensor:
    return texts.states_of(ids, mask, model, encode)


# -- sampling ----------------------------------------------------------------------------------------------------------


def get_timesteps_sigmas(sampling_steps: int, shift: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(timesteps [steps] on the 0..1000 scale, sigmas [steps + 1] from 1 to 0), which `shift` moves towards noise."""
    sigmas = flow_schedule(sampling_steps, shift).float()
    return (sigmas[:-1] * NUM_TRAIN_TIMESTEPS).to(device), sigmas


def step(latents: Tensor, noise_pred: Tensor, sigmas: Tensor, step_i: int) -> Tensor:
    """Latents at sigmas[step_i + 1], float32, of those at sigmas[step_i] and the velocity there."""
    return latents.float() - (sigmas[step_i] - sigmas[step_i + 1]) * noise_pred.float()


class HunyuanImageLoRANetwork(KnownNetwork):
    """LoRA of HunyuanImage 2.1."""

    def __init__(
        self, text_encoders: Any, unet: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float | None = 1,
        dropout: float | None = None, rank_dropout: float | None = None, module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None, module_class: type = LoRAModule, modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, float] | None = None, split_qkv: bool = False,
        reg_dims: Mapping[str, int] | None = None, ggpo_beta: float | None = None, ggpo_sigma: float | None = None,
        reg_lrs: Mapping[str, float] | None = None, verbose: bool = False,
    ) -> None:
        pairs = {
            **shared_pairs(rank_dropout, module_dropout, conv_lora_dim, conv_alpha, verbose),
            "split_qkv": split_qkv or None, "network_reg_dims": reg_dims, "network_reg_lrs": reg_lrs,
            "ggpo_beta": ggpo_beta, "ggpo_sigma": ggpo_sigma,
        }
        self.build(
            text_encoders, unet, multiplier, lora_dim, alpha, dropout, pairs, module_class, modules_dim, modules_alpha
        )


def sample_images(
    accelerator: Any, args: Any, epoch: int | None, steps: int, dit: Any, vae: Any, text_encoders: Any,
    sample_prompts_te_outputs: Any, prompt_replacement: Replacement | None = None,
) -> None:
    """The samples where they are due; `sample_prompts_te_outputs` (text -> list of outputs) spares the text
    encoders."""
    sample_family(
        "hunyuan_image", accelerator, args, epoch, steps, vae, dit, text_encoders, None, sample_prompts_te_outputs,
        prompt_replacement,
    )  # fmt: skip
