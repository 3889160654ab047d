"""What random checkpoints with a U-Net (Stable Diffusion 1 and 2, SDXL) share: one file in the original layout and a
tokenizer.

They go through the loaders of real checkpoints; what their shapes do not tell stands in the file's `model_config`
metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.open_clip_convert import hf_to_open_clip
from library.components.ldm_models import AutoEncoder, AutoEncoderParams
from library.components.unet_models import UNetParams
from library.components.unet_utils import unet_file_state
from library.tiny_models.vocabularies import write_clip_tokenizer
from library.tiny_models.weights import clip_state, prefixed, random_state, save_part

VAE = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4, quant_conv=True)
SIZES: dict[str, Any] = {"channels": (16, 16, 32), "time_embed_dim": 32, "norm_groups": 4}

TextWriter = Callable[[torch.Generator, int], tuple[dict[str, Tensor], dict[str, Any]]]
"""(generator, vocabulary size) -> (weights in file layout, entries of `model_config`)"""


@dataclass(frozen=True)
class TinyUNet:
    """`model`: the checkpoint; `kind`: sd1, sd2 or sdxl."""

    folder: Path
    model: Path
    tokenizer: Path
    kind: str
    params: UNetParams

    def arguments(self) -> list[str]:
        """Command-line options that name the model."""
        more = ["--v2"] if self.kind == "sd2" else []
        return [f"--pretrained_model_name_or_path={self.model}", f"--clip_tokenizer={self.tokenizer}", *more]


def write_checkpoint(tiny: TinyUNet, unet: nn.Module, text: TextWriter, *, seed: int, dtype: torch.dtype) -> TinyUNet:
    """Write U-Net, autoencoder and text encoders into one file, and the tokenizer. The U-Net is filled with random
    weights."""
    generator = torch.Generator("cpu").manual_seed(seed)
    vocab = write_clip_tokenizer(tiny.tokenizer)
    unet.load_state_dict(random_state(unet, generator))
    state = prefixed("model.diffusion_model.", unet_file_state(unet, tree_is_diffusers=tiny.kind != "sdxl"))
    state |= prefixed("first_stage_model.", random_state(AutoEncoder(VAE), generator))
    text_state, text_config = text(generator, vocab)
    config = {
        "heads": tiny.params.heads,
        "norm_groups": tiny.params.norm_groups,
        "vae": {"norm_groups": VAE.norm_groups},
    }
    save_part(state | text_state, tiny.model, config | text_config, dtype)
    return tiny


def open_clip_state(generator: torch.Generator, *, width: int, layers: int, vocab: int) -> dict[str, Tensor]:
    """Weights of a text encoder in the layout of OpenCLIP."""
    state = clip_state(generator, width=width, layers=layers, vocab=vocab)
    state["text_projection.weight"] = torch.randn(width, width, generator=generator) / width**0.5
    state["logit_scale"] = torch.tensor(4.6)
    return hf_to_open_clip(state)
