"""Lumina-Image 2.0: the layers that adapters train; those of the embedders only with `embedder_dims`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.lazy_names import lazy_names
from networks.kinds.targets import (
    ChoiceRule,
    EntryRule,
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
    __name__, {"LoRANetwork": "library.compat.lumina_names:LoRANetwork", "LoRAModule": "networks.lora:LoRAModule"}
)

BLOCK, FINAL = ("JointTransformerBlock",), ("FinalLayer",)
GEMMA2_PATHS = tuple(
    f"layers.{{i}}.{leaf}"
    for leaf in (
        *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )
)  # fmt: skip


def qkv_rows(out_features: int, in_features: int) -> list[int]:
    """Rows of q, k and v in a fused projection: there are fewer heads for keys and values than for queries."""
    return [in_features, *[(out_features - in_features) // 2] * 2]


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs, from the table of the denoiser's own conversion."""
    from library.checkpoints.lumina_convert import ROWS, TOP
    from networks.files.file_names import LayerNames

    blocks = [(f"{row}.{{i}}.", rules) for row, rules in ROWS.items()]
    return tuple(
        LayerNames(
            place + rule.original, tuple(place + part for part in rule.parts),
            rows="queries_first" if len(rule.parts) == 3 else "equal",
        )
        for place, rules in [("", TOP), *blocks]
        for rule in rules
    )  # fmt: skip


TARGETS = NetworkTargets(
    family="lumina",
    file_state="library.lumina_utils:denoiser_state",
    classes=BLOCK + FINAL,
    attention_classes=("JointAttention",),
    text_encoders=(
        TextEncoderTargets(
            "lora_te", ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP"),
            aliases=("lora_te1", "lora_te_model", "lora_te1_model"),
            comfy_name="text_encoders.gemma2_2b.transformer.model", paths=GEMMA2_PATHS,
            file_state="library.components.gemma_encoder_utils:gemma2_state",
        ),
    ),
    choice=ChoiceRule(
        "train_blocks",
        {"all": BLOCK + FINAL, **dict.fromkeys(("transformer", "noise_refiner", "context_refiner", "refiners"), BLOCK)},
        paths={
            "transformer": r"layers\..*", "noise_refiner": r"noise_refiner\..*",
            "context_refiner": r"context_refiner\..*", "refiners": r"(noise|context)_refiner\..*",
        },
    ),
    parts=(  # the narrowest first
        PartRule("refiner_dim", r"(noise|context)_refiner\..*"),
        PartRule("attn_dim", r".*\.attention\..*"),
        PartRule("mlp_dim", r".*\.feed_forward\..*"),
        PartRule("mod_dim", r".*\.adaLN_modulation\..*"),
    ),
    entries=EntryRule("embedder_dims", (("x", r"x_embedder"), ("t", r"t_embedder\..*"), ("cap", r"cap_embedder\..*"))),
    splits=(SplitRule(r".*\.attention\.qkv", qkv_rows),),
)
