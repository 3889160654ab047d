"""Anima: the layers that adapters train. Modulations, norms, embedders and the final layer only when a pattern includes them."""

from __future__ import annotations

from networks.lora import check_network_args, create_network, create_network_from_weights
from networks.targets import NetworkTargets, TextEncoderTargets

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

TARGETS = NetworkTargets(
    family="anima",
    classes=("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    attention_classes=("ImageAttention",),
    optional_classes={"train_llm_adapter": ("LLMAdapterTransformerBlock",)},
    text_encoders=(
        TextEncoderTargets("lora_te", ("Qwen3Attention", "Qwen3SdpaAttention", "Qwen3FlashAttention2", "Qwen3MLP")),
    ),
    default_excludes=(r".*(_modulation|_norm|_embedder|final_layer).*",),
    regex_on_path=True,
)
