"""Complete Stable Diffusion 1, 2 and SDXL checkpoints with random weights, one file each in the original layout.

They go through the loaders of real checkpoints; what their shapes do not tell stands in the file's `model_config` metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.ldm_models import AutoEncoder, AutoEncoderParams
from library.open_clip_convert import hf_to_open_clip
from library.safetensors_utils import save_file_atomic
from library.sd_models import UNet2DConditionModel
from library.sdxl_models import SdxlUNet2DConditionModel
from library.unet_models import UNetParams
from library.unet_utils import unet_file_state
from tests.tiny import clip_state, random_state, write_clip_tokenizer

VAE = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4, quant_conv=True)
KINDS = ("sd1", "sd2", "sdxl")


@dataclass(frozen=True)
class TinySd:
    """`arguments()`: command-line options that name the model."""

    folder: Path
    model: Path
    tokenizer: Path
    kind: str
    params: UNetParams

    def arguments(self) -> list[str]:
        more = ["--v2"] if self.kind == "sd2" else []
        return [f"--pretrained_model_name_or_path={self.model}", f"--clip_tokenizer={self.tokenizer}", *more]


def tiny_params(kind: str, num_res_blocks: int = 1) -> UNetParams:
    sizes: dict[str, Any] = {"num_res_blocks": num_res_blocks, "time_embed_dim": 32, "norm_groups": 4}
    if kind == "sdxl":
        return UNetParams(
            channels=(16, 16, 32), attention_levels=(False, True, True), transformer_depth=(0, 1, 2), middle_depth=2, heads=(2, 2, 4),
            context_dim=48, use_linear_projection=True, adm_in_channels=32 + 6 * 8, **sizes,
        )  # fmt: skip
    return UNetParams(
        channels=(16, 16, 32), attention_levels=(True, True, False), transformer_depth=(1, 1, 0), heads=2, context_dim=32,
        use_linear_projection=kind == "sd2", upcast_attention=kind == "sd2", **sizes,
    )  # fmt: skip


def build_tiny_sd(
    folder: str | Path, kind: str = "sd1", *, seed: int = 0, num_res_blocks: int = 1, dtype: torch.dtype = torch.float32
) -> TinySd:
    """Write a model of a kind (sd1, sd2, sdxl) and its tokenizer into `folder` (made when missing). Real models have two
    residual blocks a level, on which the names of their layers in diffusers depend."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = tiny_params(kind, num_res_blocks)
    vocab = write_clip_tokenizer(folder / "tokenizer")
    unet = (SdxlUNet2DConditionModel if kind == "sdxl" else UNet2DConditionModel)(params)
    unet.load_state_dict(random_state(unet, generator))
    state = {f"model.diffusion_model.{k}": v for k, v in unet_file_state(unet, tree_is_diffusers=kind != "sdxl").items()}
    state |= {f"first_stage_model.{k}": v for k, v in random_state(AutoEncoder(VAE), generator).items()}
    text = {"heads": 2, "eos": vocab - 1}
    config: dict[str, Any] = {"heads": params.heads, "norm_groups": params.norm_groups, "vae": {"norm_groups": VAE.norm_groups}}
    if kind == "sd1":
        state |= _prefixed("cond_stage_model.transformer.", clip_state(generator, width=32, layers=2, vocab=vocab))
        config["clip_l"] = text
    elif kind == "sd2":
        config |= {"use_linear_projection": True, "clip_h": text | {"layers": 2}}
        state |= _prefixed("cond_stage_model.model.", _open_clip(generator, width=32, layers=3, vocab=vocab))
    else:
        config |= {"clip_l": text, "clip_g": text}
        state |= _prefixed("conditioner.embedders.0.transformer.", clip_state(generator, width=16, layers=2, vocab=vocab))
        state |= _prefixed("conditioner.embedders.1.model.", _open_clip(generator, width=32, layers=3, vocab=vocab))
    path = folder / f"{kind}.safetensors"
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in state.items()}
    save_file_atomic(tensors, path, {"model_config": json.dumps(config, sort_keys=True)})
    return TinySd(folder, path, folder / "tokenizer", kind, params)


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def _open_clip(generator: torch.Generator, *, width: int, layers: int, vocab: int) -> dict[str, Tensor]:
    state = clip_state(generator, width=width, layers=layers, vocab=vocab)
    state["text_projection.weight"] = torch.randn(width, width, generator=generator) / width**0.5
    state["logit_scale"] = torch.tensor(4.6)
    return hf_to_open_clip(state)
