"""Kinds of model files that several families use: text and image encoders, and what belongs to no family. Those of one
family stand in its record."""

from __future__ import annotations

from typing import Any

from library.families.record import ModelKind, Signature

CLIP_EMBEDDINGS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
"""of a CLIP text encoder in the names of transformers; version 5 leaves `text_model.` out"""
_IN_BUNDLE = "text_encoders.clip_g."
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"


def clip_detail(table: Any) -> str:
    """Width and depth of a CLIP text encoder, of a KeyTable."""
    width = next((width for name in CLIP_EMBEDDINGS if (width := table.size(name, 1)) is not None), None)
    return f"width {width}, {table.count('encoder.layers.{}.')} layers"


def t5_detail(table: Any) -> str:
    """Width and depth of a T5 encoder, of a KeyTable."""
    return f"width {table.size('encoder.block.0.layer.0.SelfAttention.q.weight', 1)}, {table.count('encoder.block.{}.')} layers"


def _clip(title: str, width: int) -> tuple[Signature, ...]:
    return tuple(Signature(title=title, sizes=((name, 1, (width,)),), priority=10) for name in CLIP_EMBEDDINGS)


# In the order in which they are asked for, within one priority.
PART_KINDS: tuple[ModelKind, ...] = (
    ModelKind(
        name="clip_g", role="text_encoder", wanted="a CLIP-G text encoder (clip_g.safetensors)", subfolder="text_encoder_2",
        signatures=(
            *_clip("a CLIP-G text encoder", 1280),
            Signature(
                title="a CLIP-G text encoder", contains=(_IN_BUNDLE,), has=CLIP_EMBEDDINGS[:1], priority=11,
            ),
            Signature(
                title="a CLIP-G text encoder", contains=(_OPEN_CLIP,), sizes=(("token_embedding.weight", 1, (1280,)),),
                layout="open_clip",
                priority=10,
            ),
        ),
    ),
    ModelKind(
        name="clip_h", role="text_encoder",
        signatures=(
            *_clip("a CLIP-H text encoder", 1024),
            Signature(title="a CLIP text encoder", contains=(_OPEN_CLIP,), layout="open_clip"),
        ),
    ),
    ModelKind(
        name="clip_l", role="text_encoder", wanted="a CLIP-L text encoder (clip_l.safetensors)",
        subfolder="text_encoder",
        signatures=tuple(
            Signature(title="a CLIP-L text encoder", has=(name,), detail="library.checkpoints.part_kinds:clip_detail") for name in CLIP_EMBEDDINGS
        ),
    ),
    ModelKind(
        name="umt5", role="text_encoder",
        wanted="an umT5-XXL text encoder (models_t5_umt5-xxl-enc-bf16.pth, umt5_xxl_fp16.safetensors)",
        subfolder="text_encoder",
        signatures=(
            Signature(title="a UMT5 text encoder", has=("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",)),
            Signature(title="a UMT5 text encoder", has=("blocks.0.pos_embedding.embedding.weight", "token_embedding.weight")),
        ),
    ),
    ModelKind(
        name="byt5", role="text_encoder", wanted="a ByT5 glyph encoder (byt5_small_glyphxl_fp16.safetensors)",
        subfolder="text_encoder_2",
        signatures=(
            Signature(
                title="a ByT5 text encoder", contains=("encoder.block.0.layer.0.SelfAttention.q.weight",),
                sizes=(("shared.weight", 0, (384, 1510)),),
            ),
        ),
    ),
    ModelKind(
        name="t5", role="text_encoder", wanted="a T5-XXL text encoder (t5xxl_fp16.safetensors)",
        subfolder="text_encoder_2",
        signatures=(
            Signature(
                title="a T5 text encoder", has=("encoder.block.0.layer.0.SelfAttention.q.weight",),
                detail="library.checkpoints.part_kinds:t5_detail",
            ),
            Signature(title="a T5 text encoder", has=("enc.blk.0.attn_q.weight",), layout="GGUF names"),
        ),
    ),
    ModelKind(
        name="qwen25_vl", role="text_encoder",
        wanted="a Qwen2.5-VL text encoder (qwen_2.5_vl_7b.safetensors, or its folder)",
        subfolder="text_encoder",
        signatures=(
            Signature(title="a Qwen2.5-VL model", contains=("visual.blocks.0.", "layers.0.self_attn.q_proj.bias")),
            Signature(title="the text tower of a Qwen2.5-VL model", has=("layers.0.self_attn.q_proj.bias",)),
        ),
    ),
    ModelKind(
        name="qwen3", role="text_encoder", wanted="a Qwen3 text encoder (qwen_3_06b_base.safetensors, or its folder)",
        subfolder="text_encoder",
        signatures=(Signature(title="a Qwen3 text encoder", has=("layers.0.self_attn.q_norm.weight",)),),
    ),
    ModelKind(
        name="gemma2", role="text_encoder",
        wanted="a Gemma-2-2B text encoder (gemma_2_2b_fp16.safetensors, or its folder)", subfolder="text_encoder",
        signatures=(Signature(title="a Gemma 2 text encoder", has=("layers.0.pre_feedforward_layernorm.weight",)),),
    ),
    ModelKind(
        name="llama", role="text_encoder",
        wanted="a LLaMA 3 language model (llava_llama3_fp16.safetensors, or its folder)", subfolder="text_encoder",
        signatures=(Signature(title="a LLaMA language model", has=("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")),),
    ),
    ModelKind(
        name="siglip", role="text_encoder",
        wanted="a SigLIP image encoder (sigclip_vision_patch14_384.safetensors, or its folder)",
        signatures=(Signature(title="a SigLIP image encoder", has=("vision_model.head.probe",)),)
    ),
    ModelKind(
        name="clip_vision", role="text_encoder", subfolder="image_encoder",
        wanted="a CLIP vision encoder (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, clip_vision_h.safetensors)",
        signatures=(
            Signature(title="a CLIP image encoder", has=("vision_model.embeddings.class_embedding",)),
            Signature(title="a CLIP image encoder", contains=("visual.cls_embedding",)),
        ),
    ),
    ModelKind(name="adapter", role="other", wanted="a LoRA-type adapter"),
    ModelKind(
        name="lllite", role="other", wanted="a ControlNet-LLLite file",
        signatures=(Signature(title="a ControlNet-LLLite", contains=("lllite_unet_", ".conditioning1.0.weight")),),
    ),
)  # fmt: skip
