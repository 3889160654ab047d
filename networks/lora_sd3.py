"""SD3 and SD3.5: the layers that adapters train. Names are those of the module tree, which are the original ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.core.lazy_names import lazy_names
from networks.kinds.targets import (
    CLIP_CLASSES,
    CLIP_PATHS,
    T5_PATHS,
    EntryRule,
    IndexRule,
    NetworkTargets,
    PartRule,
    SplitRule,
    TextEncoderTargets,
)
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

__getattr__, __dir__ = lazy_names(
    __name__, {"LoRANetwork": "library.compat.sd3_names:LoRANetwork", "LoRAModule": "networks.lora:LoRAModule"}
)

_TEXT_OUTPUT = re.compile(r"context_block[._](?:attn[._]proj|mlp)|to_add_out|ff_context")
_BLOCK = re.compile(r"(?:joint|transformer)_blocks[._](\d+)[._]")
LAST_BLOCKS = (23, 37)
"""numbers of the last block of released models, whose text has no output"""


def qkv_rows(out_features: int, in_features: int) -> list[int]:
    """Rows of q, k and v in a fused projection."""
    return [out_features // 3] * 3


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs, from the table of the denoiser's own conversion."""
    return _layers(None)


def file_layers_of(names: Iterable[str]) -> tuple[LayerNames, ...]:
    """The same for the model that these layers are of: diffusers keeps the modulation of the text the other way round
    in the last block, which has no layers behind the attention of the text."""
    numbers: dict[int, bool] = {}  # block -> whether the text of the block has an output
    for name in names:
        if match := _BLOCK.search(name):
            number = int(match[1])
            numbers[number] = numbers.get(number, False) or bool(_TEXT_OUTPUT.search(name))
    last = max(numbers, default=-1)
    is_last = last >= 0 and not numbers[last] and (last in LAST_BLOCKS or any(numbers.values()))
    return _layers(last if is_last else None)


def _layers(last: int | None) -> tuple[LayerNames, ...]:
    from library.checkpoints.sd3_convert import denoiser_rules
    from networks.files.file_names import LayerNames

    layers = []
    if last is not None:
        text, other = f"joint_blocks.{last}.context_block", f"transformer_blocks.{last}"
        layers.append(LayerNames(f"{text}.adaLN_modulation.1", (f"{other}.norm1_context.linear",), "swapped"))
    for rule in denoiser_rules(2):
        path, _, parameter = rule.original.rpartition(".")
        if parameter == "weight" and "blocks.1." not in path:
            names = [name.removesuffix(".weight").replace("blocks.0.", "blocks.{i}.") for name in (path, *rule.parts)]
            layers.append(LayerNames(names[0], tuple(names[1:]), "swapped" if rule.swap_halves else "equal"))
    return tuple(layers)


TARGETS = NetworkTargets(
    family="sd3",
    file_state="library.sd3_utils:denoiser_state",
    classes=("SingleDiTBlock",),
    attention_classes=("AttentionLinears",),
    text_encoders=(
        TextEncoderTargets(
            "lora_te1",
            CLIP_CLASSES,
            root="text_model",
            aliases=("lora_te",),
            diffusers_name="text_encoder",
            comfy_name="text_encoders.clip_l.transformer",
            paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:clip_l_state",
        ),
        TextEncoderTargets(
            "lora_te2",
            CLIP_CLASSES,
            root="text_model",
            diffusers_name="text_encoder_2",
            comfy_name="text_encoders.clip_g.transformer",
            paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:clip_g_state",
        ),
        TextEncoderTargets(
            "lora_te3",
            ("T5Attention", "T5DenseGatedActDense"),
            switch="train_t5xxl",
            diffusers_name="text_encoder_3",
            comfy_name="text_encoders.t5xxl.transformer",
            paths=T5_PATHS,
            file_state="library.components.text_encoder_utils:t5_state",
        ),
    ),
    parts=(
        PartRule("context_attn_dim", r"joint_blocks\.\d+\.context_block\.attn\..*"),
        PartRule("context_mlp_dim", r"joint_blocks\.\d+\.context_block\.mlp\..*"),
        PartRule("context_mod_dim", r"joint_blocks\.\d+\.context_block\.adaLN_modulation\..*"),
        PartRule("x_attn_dim", r"joint_blocks\.\d+\.x_block\.attn2?\..*"),
        PartRule("x_mlp_dim", r"joint_blocks\.\d+\.x_block\.mlp\..*"),
        PartRule("x_mod_dim", r"joint_blocks\.\d+\.x_block\.adaLN_modulation\..*"),
    ),
    entries=EntryRule(
        "emb_dims",
        (
            ("context", r"context_embedder"),
            ("t", r"t_embedder\..*"),
            ("x", r"x_embedder\..*"),
            ("y", r"y_embedder\..*"),
            ("final_mod", r"final_layer\.adaLN_modulation\..*"),
            ("final_linear", r"final_layer\.linear"),
        ),
    ),
    indices=(IndexRule("train_block_indices", r"joint_blocks\.(\d+)\."),),
    splits=(SplitRule(r"joint_blocks\.\d+\.(context|x)_block\.attn2?\.qkv", qkv_rows),),
)
