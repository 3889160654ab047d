"""What a reader says of a file from which tensors are missing by which its part is known: those that are, and no
other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

from library import (
    anima_utils,
    chroma_utils,
    flux_utils,
    hunyuan_image_utils,
    lumina_utils,
    sd3_utils,
)
from library.components import (
    gemma_encoder_utils,
    llm_encoder_utils,
    text_encoder_utils,
    unet_utils,
    wan_vae_utils,
)
from library.components.ldm_utils import inspect_autoencoder
from library.core.errors import CheckpointError
from library.sd_utils import VAE_WANTED
from tests.runs.families import key_table

_BLOCK = "encoder.block.0.layer."
T5_MARKS = (
    "shared.weight", f"{_BLOCK}0.SelfAttention.q.weight", f"{_BLOCK}0.SelfAttention.relative_attention_bias.weight",
    f"{_BLOCK}1.DenseReluDense.wi_0.weight",
)  # fmt: skip
CLIP_MARKS = (
    "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.0.mlp.fc1.weight",
)  # fmt: skip
AE_MARKS = ("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight")
STREAM_MARKS = ("double_blocks.0.img_attn.norm.query_norm.scale", "img_in.weight")
READERS: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    "flux": (flux_utils.inspect_flow_model, "flux_dev", STREAM_MARKS),
    "chroma": (chroma_utils.inspect_chroma, "chroma", STREAM_MARKS),
    "sd3": (
        sd3_utils.inspect_sd3, "sd35_medium", ("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"),
    ),
    "lumina": (lumina_utils.inspect_lumina, "lumina2", (lumina_utils.MARK, "cap_embedder.1.weight")),
    "hunyuan_image": (
        hunyuan_image_utils.inspect_hunyuan_image, "hunyuan_image",
        ("byt5_in.fc1.weight", "double_blocks.0.img_attn_qkv.weight"),
    ),
    "anima": (
        anima_utils.inspect_anima, "anima",
        ("net.blocks.0.adaln_modulation_self_attn.1.weight", "net.x_embedder.proj.1.weight"),
    ),
    "unet": (unet_utils.inspect_unet, "sdxl_unet", ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight")),
    "ae": (flux_utils.inspect_ae, "vae_ldm16", AE_MARKS),
    "sd3 ae": (sd3_utils.inspect_vae_sd3, "vae_ldm16", AE_MARKS),
    "sd vae": (partial(inspect_autoencoder, wanted=VAE_WANTED), "vae_ldm4", AE_MARKS),
    "32x vae": (hunyuan_image_utils.inspect_vae, "vae_hunyuan_image", AE_MARKS),
    "wan vae": (
        wan_vae_utils.inspect_wan_vae, "vae_wan",
        ("encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "conv2.weight"),
    ),
    "clip_l": (text_encoder_utils.inspect_clip_l, "clip_l", CLIP_MARKS),
    "clip_g": (partial(sd3_utils.inspect_encoder, "clip_g"), "clip_g_hf", CLIP_MARKS),
    "t5xxl": (text_encoder_utils.inspect_t5xxl, "t5xxl", T5_MARKS),
    "byt5": (text_encoder_utils.inspect_t5xxl, "byt5_glyph", T5_MARKS),
    "gemma2": (
        gemma_encoder_utils.inspect_gemma2, "gemma2_2b",
        ("model.embed_tokens.weight", "model.layers.0.pre_feedforward_layernorm.weight"),
    ),
    "qwen25_vl": (
        llm_encoder_utils.inspect_qwen25_vl, "qwen25_vl_7b",
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"),
    ),
    "qwen3": (
        llm_encoder_utils.inspect_qwen3, "qwen3_0_6b",
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"),
    ),
}  # fmt: skip
"""part -> (its reader, a real file, the names in it by which the part is known)"""


@pytest.mark.parametrize("part", READERS)
def test_a_reader_names_each_mark_that_is_missing_and_no_other(part: str) -> None:
    inspect, table, marks = READERS[part]
    whole = {name: torch.empty(shape, device="meta") for name, shape in key_table(table).items()}
    for lacking in (*itertools.combinations(marks, 1), marks):
        with pytest.raises(CheckpointError, match=r"holds no .* \(it lacks ") as caught:
            inspect({name: tensor for name, tensor in whole.items() if name not in lacking})
        told = str(caught.value).partition("(it lacks ")[2].partition(";")[0]
        # a prefix before all names is left out
        assert all(any(mark.endswith(name) for mark in lacking) for name in told.replace(" or ", ", ").split(", ")
                   if name != "encoder.embed_tokens.weight"), told
        assert told.count(",") + 1 == len(lacking), told


def test_what_another_language_model_has_is_named() -> None:
    whole = {name: torch.empty(shape, device="meta") for name, shape in key_table("qwen3_0_6b").items()}
    strange = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(CheckpointError, match="it has layers.0.self_attn.q_proj.bias, which that has not"):
        llm_encoder_utils.inspect_qwen3({**whole, strange: torch.empty(2048, device="meta")})
