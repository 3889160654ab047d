"""A complete Lumina-Image 2.0 set with random weights: denoiser, autoencoder, Gemma 2 with its tokenizer inside.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from library.components.ldm_models import AutoEncoder, AutoEncoderParams
from library.lumina_models import LuminaParams, NextDiT
from library.tiny_models.vocabularies import gemma_pieces, sentencepiece_model
from library.tiny_models.weights import prefixed, random_state, random_weight, save_part

GEMMA_WIDTH, GEMMA_HEADS, GEMMA_KV_HEADS, GEMMA_HEAD, GEMMA_HIDDEN, GEMMA_LAYERS = 24, 2, 1, 16, 40, 2
GEMMA_CONFIG: dict[str, Any] = {"head_dim": GEMMA_HEAD, "query_pre_attn_scalar": GEMMA_HEAD}
PREFIXES = {"denoiser": "model.diffusion_model.", "ae": "vae.", "gemma2": "text_encoders.gemma2_2b.transformer."}
"""where the parts stand in a file that holds all of them"""


@dataclass(frozen=True)
class TinyLumina:
    """Paths of the set. `gemma2` carries its tokenizer as `spiece_model`; with `whole` all three are one file."""

    folder: Path
    lumina: Path
    ae: Path
    gemma2: Path
    params: LuminaParams
    ae_params: AutoEncoderParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        own = [f"--gemma2={self.gemma2}", f"--ae={self.ae}"] if self.ae != self.lumina else []
        return [f"--pretrained_model_name_or_path={self.lumina}", *own, "--gemma2_max_token_length=32"]


def build_tiny_lumina(
    folder: str | Path,
    *,
    seed: int = 0,
    dim: int = 48,
    layers: int = 3,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TinyLumina:
    """Write the set into `folder` (made when missing) and return its paths. `dim` is a multiple of 24 (4 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = LuminaParams(
        dim=dim, n_layers=layers, n_refiner_layers=1, n_heads=4, n_kv_heads=2, ffn_hidden=2 * dim,
        axes_dims=(dim // 12,) * 3, cap_feat_dim=GEMMA_WIDTH, time_dim=dim,
    )  # fmt: skip
    ae_params = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4)
    pieces = gemma_pieces()
    parts = {
        "denoiser": random_state(NextDiT(params), generator),
        "ae": random_state(AutoEncoder(ae_params), generator),
        "gemma2": prefixed("model.", gemma2_state(generator, vocab=len(pieces))),
    }
    spiece_model = torch.frombuffer(bytearray(sentencepiece_model(pieces)), dtype=torch.uint8)
    configs = {"denoiser": {}, "ae": asdict(ae_params), "gemma2": GEMMA_CONFIG}
    names = {"denoiser": "lumina2", "ae": "ae", "gemma2": "gemma2"}
    paths = {part: folder / f"{name}.safetensors" for part, name in names.items()}
    if whole:
        paths = dict.fromkeys(paths, folder / "lumina2_all_in_one.safetensors")
        state = {key: tensor for part, own in parts.items() for key, tensor in prefixed(PREFIXES[part], own).items()}
        state["text_encoders.gemma2_2b.spiece_model"] = spiece_model
        save_part(state, paths["denoiser"], {"vae": configs["ae"], "gemma2": configs["gemma2"]}, dtype)
    else:
        parts["gemma2"]["spiece_model"] = spiece_model
        for part, state in parts.items():
            save_part(state, paths[part], configs[part], dtype)
    return TinyLumina(folder, paths["denoiser"], paths["ae"], paths["gemma2"], params, ae_params)


def gemma2_state(generator: torch.Generator, *, vocab: int) -> dict[str, torch.Tensor]:
    """Weights of a Gemma 2 model under the names of its module tree."""
    queries, keys = GEMMA_HEADS * GEMMA_HEAD, GEMMA_KV_HEADS * GEMMA_HEAD
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, GEMMA_WIDTH), "norm.weight": (GEMMA_WIDTH,)}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for number in range(GEMMA_LAYERS):
        place = f"layers.{number}."
        shapes |= {f"{place}self_attn.q_proj.weight": (queries, GEMMA_WIDTH)}
        shapes |= {f"{place}self_attn.o_proj.weight": (GEMMA_WIDTH, queries)}
        shapes |= {f"{place}self_attn.{name}_proj.weight": (keys, GEMMA_WIDTH) for name in "kv"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (GEMMA_HIDDEN, GEMMA_WIDTH) for name in ("gate", "up")}
        shapes |= {f"{place}mlp.down_proj.weight": (GEMMA_WIDTH, GEMMA_HIDDEN)}
        shapes |= {f"{place}{name}.weight": (GEMMA_WIDTH,) for name in norms}
    state = {key: random_weight(key, shape, generator) for key, shape in shapes.items()}
    # its norms multiply by 1 + weight, and its embeddings come times the root of the width
    return {key: tensor - 1 if tensor.ndim == 1 else tensor for key, tensor in state.items()}
