"""A complete Wan set with random weights: denoiser (two for Wan 2.2), autoencoder, umT5, CLIP vision encoder,
tokenizer.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from library.components.wan_vae_models import WanVAE, WanVAEParams
from library.families.wan_tasks import TASKS
from library.tiny_models.vocabularies import T5_ROWS, write_t5_tokenizer
from library.tiny_models.weights import random_state, random_weight, save_part, t5_state
from library.wan_models import WanModel, WanParams

T5_WIDTH, VISION_WIDTH, VISION_HEADS, VISION_LAYERS, VISION_SIDE = 24, 16, 2, 3, 16


@dataclass(frozen=True)
class TinyWan:
    """Paths of the set. `high`: the expert for much noise, of Wan 2.2 alone; `clip`: of tasks that look at pictures."""

    folder: Path
    task: str
    denoiser: Path
    high: Path | None
    vae: Path
    t5: Path
    clip: Path | None
    tokenizer: Path
    params: WanParams
    vae_params: WanVAEParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        named = {
            "pretrained_model_name_or_path": self.denoiser, "dit_high_noise": self.high, "vae": self.vae,
            "t5": self.t5, "clip": self.clip, "t5_tokenizer": self.tokenizer, "task": self.task,
        }  # fmt: skip
        return [f"--{name}={path}" for name, path in named.items() if path is not None]


def build_tiny_wan(
    folder: str | Path, *, seed: int = 0, task: str = "t2v-14B", width: int = 48, num_blocks: int = 2,
    dtype: torch.dtype = torch.float32,
) -> TinyWan:
    """Write the set into `folder` (made when missing) and return its paths. `width` is a multiple of 24 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    facts = TASKS[task]
    params = WanParams(
        dim=width, ffn_dim=2 * width, num_heads=2, num_layers=num_blocks, in_dim=facts.in_dim, text_dim=T5_WIDTH,
        freq_dim=32, text_len=64, img_dim=VISION_WIDTH if facts.needs_vision else None,
        img_positions=2 * (1 + VISION_SIDE**2) if facts.takes_last else 0,
    )  # fmt: skip
    vae_params = WanVAEParams(dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
    tiny = TinyWan(
        folder, task, folder / "wan.safetensors", folder / "wan_high.safetensors" if facts.is_22 else None,
        folder / "wan_vae.safetensors", folder / "umt5.safetensors",
        folder / "clip_vision.safetensors" if facts.needs_vision else None, folder / "t5_tokenizer", params, vae_params,
    )  # fmt: skip
    shapes_lack = {"num_heads": 2, "text_len": params.text_len}
    for path in filter(None, (tiny.denoiser, tiny.high)):
        save_part(random_state(WanModel(params), generator), path, shapes_lack, dtype)
    save_part(random_state(WanVAE(vae_params), generator), tiny.vae, {}, dtype)
    save_part(umt5_state(generator), tiny.t5, {}, dtype)
    if tiny.clip is not None:
        save_part(vision_state(generator), tiny.clip, {"heads": VISION_HEADS}, dtype)
    write_t5_tokenizer(tiny.tokenizer)
    return tiny


def build_tiny_wan_i2v(folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyWan:
    """The set for Wan 2.1 with a first frame."""
    return build_tiny_wan(folder, seed=seed, task="i2v-14B", dtype=dtype)


def build_tiny_wan22(folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyWan:
    """The set for Wan 2.2 with a first frame: two experts."""
    return build_tiny_wan(folder, seed=seed, task="i2v-A14B", dtype=dtype)


def umt5_state(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of an umT5 encoder in the names of transformers: a position bias in every block."""
    state = t5_state(generator, d_model=T5_WIDTH, d_kv=8, heads=2, d_ff=32, layers=2, vocab=T5_ROWS)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = tuple(state[bias.format(0)].shape)
    return {**state, bias.format(1): random_weight(bias.format(1), shape, generator)}


def vision_state(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of a CLIP vision encoder in the layout of Wan's own file."""
    width = VISION_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (1, 1, width), "visual.pos_embedding": (1, 1 + VISION_SIDE**2, width),
        "visual.patch_embedding.weight": (width, 3, 14, 14), "visual.head": (width, 8),
    }  # fmt: skip
    norms = ["visual.pre_norm", "visual.post_norm"]
    for number in range(VISION_LAYERS):
        place = f"visual.transformer.{number}."
        norms += [f"{place}norm1", f"{place}norm2"]
        for name, rows, columns in (
            ("attn.to_qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.0", 2 * width, width),
            ("mlp.2", width, 2 * width),
        ):  # fmt: skip
            shapes |= {f"{place}{name}.weight": (rows, columns), f"{place}{name}.bias": (rows,)}
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}
