"""A complete HunyuanImage 2.1 set with random weights: denoiser, 32x autoencoder, Qwen2.5-VL, ByT5, tokenizer.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.components.ldm_models import AutoEncoderParams
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_vae import LATENT_SCALING_FACTOR, HunyuanVAE2D
from library.tiny_models.vocabularies import CHAT_MARKS, write_qwen_tokenizer
from library.tiny_models.weights import language_model_state, random_state, save_part, t5_state

QWEN_WIDTH, QWEN_HEADS, QWEN_KV_HEADS, QWEN_HIDDEN, QWEN_LAYERS = 24, 2, 1, 40, 4
BYT5_WIDTH, BYT5_ROWS = 16, 384
TEMPLATE_WORDS = (
    "system", "user", "Describe", *(f" {word}" for word in (
        "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
    ).split()),
)  # fmt: skip
"""of the captions' template, which is short with them"""


@dataclass(frozen=True)
class TinyHunyuanImage:
    """Paths of the set."""

    folder: Path
    denoiser: Path
    vae: Path
    text_encoder: Path
    byt5: Path
    tokenizer: Path
    params: HYImageParams
    vae_params: AutoEncoderParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.denoiser}", f"--vae={self.vae}",
            f"--text_encoder={self.text_encoder}", f"--byt5={self.byt5}",
            f"--text_encoder_tokenizer={self.tokenizer}",
        ]  # fmt: skip


def build_tiny_hunyuan_image(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    depth: int = 1,
    depth_single: int = 2,
    guidance: bool = False,
    mean_flow: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TinyHunyuanImage:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 8 (2 heads);
    `guidance` and `mean_flow` make a distilled model."""  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = HYImageParams(
        hidden_size=hidden, num_heads=2, depth=depth, depth_single=depth_single, refiner_depth=1, mlp_ratio=2.0,
        text_dim=QWEN_WIDTH, byt5_dim=BYT5_WIDTH, byt5_mid=24, rope_dim_list=(hidden // 4, hidden // 4),
        guidance_embed=guidance, mean_flow=mean_flow,
    )  # fmt: skip
    vae_params = AutoEncoderParams(
        ch=8, ch_mult=(1, 1, 1, 2, 4, 16), num_res_blocks=1, z_channels=64, norm_groups=4,
        scaling_factor=LATENT_SCALING_FACTOR, shift_factor=0.0,
    )  # fmt: skip
    tiny = TinyHunyuanImage(
        folder, folder / "hunyuanimage.safetensors", folder / "hunyuanimage_vae.safetensors",
        folder / "qwen_2.5_vl.safetensors", folder / "byt5.safetensors", folder / "qwen_tokenizer", params, vae_params,
    )  # fmt: skip
    save_part(random_state(HYImageDiffusionTransformer(params), generator), tiny.denoiser, {}, dtype)
    save_part(_vae_state(vae_params, generator), tiny.vae, asdict(vae_params), dtype)
    rows = write_qwen_tokenizer(tiny.tokenizer, TEMPLATE_WORDS) + len(CHAT_MARKS)
    qwen = language_model_state(
        generator, vocab=rows, width=QWEN_WIDTH, key_width=QWEN_KV_HEADS * QWEN_WIDTH // QWEN_HEADS, hidden=QWEN_HIDDEN,
        layers=QWEN_LAYERS, has_biases=True,
    )  # fmt: skip
    save_part(qwen, tiny.text_encoder, {"num_attention_heads": QWEN_HEADS}, dtype)
    byt5 = t5_state(generator, d_model=BYT5_WIDTH, d_kv=8, heads=2, d_ff=24, layers=2, vocab=BYT5_ROWS)
    save_part(byt5, tiny.byt5, {}, dtype)
    return tiny


def _vae_state(params: AutoEncoderParams, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights with what trained ones have: latents of about 1, and draws that stay near their mean. Shortcuts
    pass by all norms, so that what blocks add to them is kept small."""
    state = random_state(HunyuanVAE2D(params), generator)
    for key, tensor in state.items():
        if key.startswith("encoder.") and key.endswith(
            ("conv_in.weight", "conv2.weight", "proj_out.weight", "sample.conv.weight")
        ):
            tensor *= 0.3
    state["encoder.conv_out.weight"][params.z_channels :] *= 0.1
    state["encoder.conv_out.bias"][params.z_channels :] -= 4
    return state
