"""Anima: the layers that adapters train. Modulations, norms, embedders and the final layer only when a pattern includes
them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from networks.kinds.targets import NetworkTargets, TextEncoderTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

QWEN3_PATHS = tuple(
    f"layers.{{i}}.{leaf}"
    for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_norm", "self_attn.k_norm",
    )
)  # fmt: skip
ATTENTIONS = (("self_attn", "attn1", "norm1"), ("cross_attn", "attn2", "norm2"))
"""(attention of a block, its name in diffusers, that of its modulation there)"""


def file_layers() -> tuple[LayerNames, ...]:
    """The layers of the denoiser and its LLM adapter under their names in files of other programs."""
    from networks.files.file_names import LayerNames

    block, theirs = "blocks.{i}.", "transformer_blocks.{i}."
    pairs = [(f"{block}mlp.layer1", f"{theirs}ff.net.0.proj"), (f"{block}mlp.layer2", f"{theirs}ff.net.2")]
    for ours, other, _ in ATTENTIONS:
        pairs += [(f"{block}{ours}.{name}_proj", f"{theirs}{other}.to_{name}") for name in "qkv"]
        pairs += [(f"{block}{ours}.output_proj", f"{theirs}{other}.to_out.0")]
        pairs += [(f"{block}{ours}.{name}_norm", f"{theirs}{other}.norm_{name}") for name in "qk"]
    for part, norm in (*((ours, norm) for ours, _, norm in ATTENTIONS), ("mlp", "norm3")):
        pairs += [(f"{block}adaln_modulation_{part}.{number}", f"{theirs}{norm}.linear_{number}") for number in (1, 2)]
    pairs += [(f"t_embedder.1.linear_{number}", f"time_embed.t_embedder.linear_{number}") for number in (1, 2)]
    pairs += [(f"final_layer.adaln_modulation.{number}", f"norm_out.linear_{number}") for number in (1, 2)]
    pairs += [("final_layer.linear", "proj_out"), ("x_embedder.proj.1", "patch_embed.proj")]
    pairs += [("t_embedding_norm", "time_embed.norm")]
    leaves = [f"{ours}.{name}_proj" for ours, _, _ in ATTENTIONS for name in "qkvo"] + ["mlp.0", "mlp.2"]
    leaves += [f"{ours}.{name}_norm" for ours, _, _ in ATTENTIONS for name in "qk"]
    leaves += ["norm_mlp", *(f"norm_{ours}" for ours, _, _ in ATTENTIONS)]
    adapter = ["in_proj", "out_proj", "norm", *(f"blocks.{{i}}.{leaf}" for leaf in leaves)]
    return (
        *(LayerNames(ours, (other,)) for ours, other in pairs),
        *(LayerNames(f"llm_adapter.{path}", (path,), model="text_conditioner") for path in adapter),
    )


TARGETS = NetworkTargets(
    family="anima",
    file_state="library.anima_utils:denoiser_state",
    classes=("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    attention_classes=("ImageAttention",),
    optional_classes={"train_llm_adapter": ("LLMAdapterTransformerBlock",)},
    text_encoders=(
        TextEncoderTargets(
            "lora_te", ("Qwen3Attention", "Qwen3SdpaAttention", "Qwen3FlashAttention2", "Qwen3MLP"),
            aliases=("lora_te1", "lora_te_model", "lora_te1_model"),
            comfy_name="text_encoders.qwen3_06b.transformer.model",
            paths=QWEN3_PATHS, file_state="library.components.llm_encoder_utils:qwen3_state",
        ),
    ),
    default_excludes=(r".*(_modulation|_norm|_embedder|final_layer).*",),
    regex_on_path=True,
)
