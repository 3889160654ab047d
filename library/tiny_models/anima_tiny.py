"""A complete Anima set with random weights: denoiser with LLM adapter, Qwen-Image type autoencoder, Qwen3, tokenizers.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from library.anima_models import AdapterParams, Anima, AnimaParams
from library.anima_utils import FILE_PREFIX
from library.components.wan_vae_models import WanVAE, WanVAEParams
from library.tiny_models.vocabularies import T5_ROWS, write_qwen_tokenizer, write_t5_tokenizer
from library.tiny_models.weights import prefixed, random_state, random_weight, save_part

QWEN_WIDTH, QWEN_HEADS, QWEN_KV_HEADS, QWEN_HEAD, QWEN_HIDDEN, QWEN_LAYERS = 24, 2, 1, 16, 40, 2


@dataclass(frozen=True)
class TinyAnima:
    """Paths of the set."""

    folder: Path
    anima: Path
    vae: Path
    qwen3: Path
    qwen3_tokenizer: Path
    t5_tokenizer: Path
    params: AnimaParams
    vae_params: WanVAEParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.anima}", f"--vae={self.vae}", f"--qwen3={self.qwen3}",
            f"--qwen3_tokenizer={self.qwen3_tokenizer}", f"--t5_tokenizer_path={self.t5_tokenizer}",
            "--qwen3_max_token_length=24", "--t5_max_token_length=32",
        ]  # fmt: skip


def build_tiny_anima(
    folder: str | Path, *, seed: int = 0, width: int = 48, num_blocks: int = 3, adapter: bool = True,
    dtype: torch.dtype = torch.float32
) -> TinyAnima:
    """Write the set into `folder` (made when missing) and return its paths. `width` is a multiple of 24 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = AnimaParams(
        model_channels=width, num_blocks=num_blocks, num_heads=2, mlp_ratio=2.0, context_dim=QWEN_WIDTH,
        adaln_lora_dim=8,
        adapter=AdapterParams(
            source_dim=QWEN_WIDTH, target_dim=QWEN_WIDTH, model_dim=QWEN_WIDTH, num_layers=2, num_heads=2,
            vocab=T5_ROWS, mlp_hidden=48
        ) if adapter else None,
    )  # fmt: skip
    vae_params = WanVAEParams(dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
    tiny = TinyAnima(
        folder, folder / "anima.safetensors", folder / "qwen_image_vae.safetensors", folder / "qwen3.safetensors",
        folder / "qwen3_tokenizer", folder / "t5_tokenizer", params, vae_params,
    )  # fmt: skip
    save_part(prefixed(FILE_PREFIX, random_state(Anima(params), generator)), tiny.anima, {}, dtype)
    save_part(random_state(WanVAE(vae_params), generator), tiny.vae, {}, dtype)
    save_part(qwen3_state(generator, vocab=write_qwen_tokenizer(tiny.qwen3_tokenizer)), tiny.qwen3, {}, dtype)
    write_t5_tokenizer(tiny.t5_tokenizer)
    return tiny


def qwen3_state(generator: torch.Generator, *, vocab: int) -> dict[str, torch.Tensor]:
    """Weights of a Qwen3 model in the layout of its single file."""
    queries, keys = QWEN_HEADS * QWEN_HEAD, QWEN_KV_HEADS * QWEN_HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, QWEN_WIDTH),
        "model.norm.weight": (QWEN_WIDTH,),
    }
    for number in range(QWEN_LAYERS):
        place = f"model.layers.{number}."
        shapes |= {
            f"{place}self_attn.q_proj.weight": (queries, QWEN_WIDTH),
            f"{place}self_attn.o_proj.weight": (QWEN_WIDTH, queries),
        }
        shapes |= {f"{place}self_attn.{name}_proj.weight": (keys, QWEN_WIDTH) for name in "kv"}
        shapes |= {f"{place}self_attn.{name}_norm.weight": (QWEN_HEAD,) for name in "qk"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (QWEN_HIDDEN, QWEN_WIDTH) for name in ("gate", "up")}
        shapes |= {f"{place}mlp.down_proj.weight": (QWEN_WIDTH, QWEN_HIDDEN)}
        shapes |= {f"{place}{name}_layernorm.weight": (QWEN_WIDTH,) for name in ("input", "post_attention")}
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}
