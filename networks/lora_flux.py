"""FLUX.1: the layers that adapters train. Files of Chroma have the same names; what it lacks is not in its table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from library.core.lazy_names import lazy_names
from networks.kinds.targets import (
    CLIP_PATHS,
    T5_PATHS,
    ChoiceRule,
    EntryRule,
    IndexRule,
    NetworkTargets,
    PartRule,
    SplitRule,
    TextEncoderTargets,
    linear1_rows,
    qkv_rows,
)
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["CHROMA_TARGETS", "TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

__getattr__, __dir__ = lazy_names(
    __name__, {"LoRANetwork": "library.compat.flux_names:LoRANetwork", "LoRAModule": "networks.lora:LoRAModule"}
)

DOUBLE, SINGLE = ("DoubleStreamBlock",), ("SingleStreamBlock",)


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs, from the table of the denoiser's own conversion."""
    from library.checkpoints.flux_convert import denoiser_rules
    from networks.files.file_names import LayerNames

    layers = []
    for rule in denoiser_rules(1, 1):
        path, _, parameter = rule.original.rpartition(".")
        if parameter in ("weight", "scale"):  # norms have a scale
            names = [name.removesuffix(".weight").replace("blocks.0.", "blocks.{i}.") for name in (path, *rule.parts)]
            rows = "swapped" if rule.swap_halves else "linear1" if path.endswith(".linear1") else "equal"
            layers.append(
                LayerNames(names[0], tuple(names[1:]), rows, parameter="" if parameter == "weight" else parameter)
            )
    return tuple(layers)


TARGETS = NetworkTargets(
    family="flux",
    file_state="library.flux_utils:denoiser_state",
    classes=DOUBLE + SINGLE,
    attention_classes=("SelfAttention",),
    text_encoders=(
        TextEncoderTargets(
            "lora_te1", ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2", "CLIPMLP"), root="text_model",
            aliases=("lora_te",), diffusers_name="text_encoder", comfy_name="text_encoders.clip_l.transformer",
            paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:clip_l_state",
        ),
        TextEncoderTargets(
            "lora_te3", ("T5Attention", "T5DenseGatedActDense"), switch="train_t5xxl", aliases=("lora_te2",),
            diffusers_name="text_encoder_2", comfy_name="text_encoders.t5xxl.transformer", paths=T5_PATHS,
            file_state="library.components.text_encoder_utils:t5_state",
        ),
    ),
    choice=ChoiceRule("train_blocks", {"all": DOUBLE + SINGLE, "double": DOUBLE, "single": SINGLE}),
    parts=(
        PartRule("img_attn_dim", r"double_blocks\.\d+\.img_attn\..*"),
        PartRule("txt_attn_dim", r"double_blocks\.\d+\.txt_attn\..*"),
        PartRule("img_mlp_dim", r"double_blocks\.\d+\.img_mlp\..*"),
        PartRule("txt_mlp_dim", r"double_blocks\.\d+\.txt_mlp\..*"),
        PartRule("img_mod_dim", r"double_blocks\.\d+\.img_mod\..*"),
        PartRule("txt_mod_dim", r"double_blocks\.\d+\.txt_mod\..*"),
        PartRule("single_dim", r"single_blocks\.\d+\.linear[12]"),
        PartRule("single_mod_dim", r"single_blocks\.\d+\.modulation\..*"),
    ),
    entries=EntryRule(
        "in_dims",
        (
            ("img", r"img_in"),
            ("time", r"time_in\..*"),
            ("vector", r"vector_in\..*"),
            ("guidance", r"guidance_in\..*"),
            ("txt", r"txt_in"),
        ),
    ),
    indices=(
        IndexRule("train_double_block_indices", r"double_blocks\.(\d+)\."),
        IndexRule("train_single_block_indices", r"single_blocks\.(\d+)\."),
    ),
    splits=(
        SplitRule(r"double_blocks\.\d+\.(img|txt)_attn\.qkv", qkv_rows),
        SplitRule(r"single_blocks\.\d+\.linear1", linear1_rows),
    ),
)

CHROMA_TARGETS = dataclasses.replace(
    TARGETS,
    family="chroma",
    text_encoders=tuple(encoder for encoder in TARGETS.text_encoders if encoder.switch == "train_t5xxl"),
    parts=tuple(part for part in TARGETS.parts if "mod" not in part.arg),
)
"""one text encoder, and no layers that modulate; of `in_dims` only the first and the last find their layer"""
