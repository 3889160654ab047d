"""Which model a table of tensor names and shapes belongs to. Names only: no weight is read.

Each `Architecture` has a test on a `KeyTable`; the first that holds wins, so that narrower tests come first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from library.checkpoints.adapter_tensors import holds_adapter

PREFIXES: tuple[str, ...] = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "net.",
    "model.",
    "module.",
    "first_stage_model.",
    "vae.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.gemma2_2b.transformer.model.",
    "language_model.model.",
    "model.language_model.",
    "transformer.",
    "unet.",
)
"""what may stand before the names of a part, in files as they are passed around"""

WHOLE_FILE_PREFIXES = ("first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.")


class KeyTable:
    """Names and shapes of a file, looked at without the prefix that stands before the names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor with this name under any known prefix, or None."""
        return next((self.shapes[p + name] for p in PREFIXES if p + name in self.shapes), None)

    def has(self, *names: str) -> bool:
        return all(self.shape(name) is not None for name in names)

    def size(self, name: str, dim: int) -> int | None:
        shape = self.shape(name)
        return shape[dim] if shape is not None and len(shape) > dim else None

    def rank(self, name: str) -> int:
        return len(self.shape(name) or ())

    def count(self, name: str) -> int:
        """Highest number + 1 at the place of `{}` in a name: `double_blocks.{}.` -> number of double blocks."""
        pattern = re.compile(r"(?:^|\.)" + re.escape(name).replace(r"\{\}", r"(\d+)"))
        return 1 + max((int(m.group(1)) for key in self.shapes if (m := pattern.search(key))), default=-1)

    def contains(self, *parts: str) -> bool:
        """Whether each part occurs in some name."""
        return all(any(part in key for key in self.shapes) for part in parts)

    @cached_property
    def is_whole_file(self) -> bool:
        return any(key.startswith(WHOLE_FILE_PREFIXES) for key in self.shapes)


@dataclass(frozen=True)
class Architecture:
    """`kind` is the name that slots ask for, `title` what a reader is told, `detail` adds what the shapes say."""

    kind: str
    title: str
    test: Callable[[KeyTable], bool]
    detail: Callable[[KeyTable], str] = lambda table: ""
    layout: str = "original"


@dataclass(frozen=True)
class Recognised:
    kind: str
    title: str
    layout: str


CROSS_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
DIFFUSERS_CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def _sd_channels(table: KeyTable) -> str:
    channels = table.size("input_blocks.0.0.weight", 1)
    return {9: "inpainting, 9 input channels", 8: "image editing, 8 input channels"}.get(channels or 4, "")


def _sd3_detail(table: KeyTable) -> str:
    if not table.has("joint_blocks.0.x_block.attn.ln_q.weight"):
        return "SD3 medium"
    return "SD3.5 medium" if table.contains("x_block.attn2.") else "SD3.5 large"


def _flux_detail(table: KeyTable) -> str:
    kind = "dev type" if table.has("guidance_in.in_layer.weight") else "schnell type"
    width = table.size("img_in.weight", 1)
    special = {384: ", fill model", 128: ", depth or canny model"}.get(width or 64, "")
    return f"{kind}{special}, {table.count('double_blocks.{}.')} double and {table.count('single_blocks.{}.')} single blocks"


def _flux_diffusers_detail(table: KeyTable) -> str:
    kind = "dev type" if table.contains("time_text_embed.guidance_embedder.") else "schnell type"
    return (
        f"{kind}, {table.count('transformer_blocks.{}.attn.add_k_proj')} double"
        f" and {table.count('single_transformer_blocks.{}.')} single blocks"
    )


def _is_lumina(table: KeyTable) -> bool:
    return table.has("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")


def _wan_detail(table: KeyTable) -> str:
    size = {1536: "1.3B", 5120: "14B"}.get(table.size("patch_embedding.weight", 0) or 0, "")
    channels = table.size("patch_embedding.weight", 1)
    if table.has("img_emb.proj.1.weight"):
        use = "image to video" + (", first and last frame" if table.has("img_emb.emb_pos") else "")
    else:
        use = {36: "2.2 image to video", 48: "control"}.get(channels or 16, "text to video")
    return f"{size} {use}".strip()


DENOISERS: tuple[Architecture, ...] = (
    Architecture(
        "flux_controlnet",
        "a FLUX.1 ControlNet",
        lambda t: t.contains("controlnet_blocks.0.") and t.contains("double_blocks.0.") or t.has("controlnet_x_embedder.weight"),
    ),
    Architecture(
        "controlnet",
        "a ControlNet",
        lambda t: t.has("controlnet_cond_embedding.conv_in.weight") or t.contains("control_model.input_hint_block."),
    ),
    Architecture(
        "sdxl_refiner",
        "an SDXL refiner",
        lambda t: t.size("label_emb.0.0.weight", 1) == 2560 and t.has("input_blocks.0.0.weight"),
    ),
    Architecture("sdxl", "an SDXL checkpoint", lambda t: t.has("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    Architecture("sd2", "a Stable Diffusion 2 checkpoint", lambda t: t.size(CROSS_ATTENTION, 1) == 1024, _sd_channels),
    Architecture("sd1", "a Stable Diffusion 1 checkpoint", lambda t: t.has(CROSS_ATTENTION), _sd_channels),
    Architecture(
        "sd3", "a Stable Diffusion 3 checkpoint", lambda t: t.has("joint_blocks.0.x_block.attn.qkv.weight"), _sd3_detail
    ),
    Architecture("chroma", "a Chroma denoiser", lambda t: t.has("distilled_guidance_layer.in_proj.weight")),
    Architecture("flux", "a FLUX.1 denoiser", lambda t: t.has("double_blocks.0.img_attn.norm.query_norm.scale"), _flux_detail),
    Architecture("framepack", "a FramePack denoiser", lambda t: t.has("clean_x_embedder.proj_2x.weight")),
    Architecture(
        "flux",
        "a FLUX.1 denoiser",
        lambda t: t.has("transformer_blocks.0.attn.add_k_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        _flux_diffusers_detail,
        "diffusers",
    ),
    Architecture(
        "hunyuan_image",
        "a HunyuanImage 2.1 denoiser",
        lambda t: t.has("byt5_in.fc1.weight") and t.rank("img_in.proj.weight") == 4,
    ),
    Architecture(
        "hunyuan_video",
        "a HunyuanVideo denoiser",
        lambda t: t.contains("txt_in.individual_token_refiner.blocks.0.norm1.weight") and t.rank("img_in.proj.weight") == 5,
        lambda t: "text to video" if t.size("img_in.proj.weight", 1) == 16 else "image to video",
    ),
    Architecture(
        "lumina2", "a Lumina-Image 2.0 denoiser", lambda t: _is_lumina(t) and t.size("cap_embedder.1.weight", 0) == 2304
    ),
    Architecture(
        "nextdit",
        "a NextDiT denoiser that is not Lumina-Image 2.0",
        _is_lumina,
        lambda t: f"width {t.size('cap_embedder.1.weight', 0)}, Lumina has 2304",
    ),
    Architecture(
        "anima",
        "an Anima denoiser",
        lambda t: t.has("blocks.0.adaln_modulation_self_attn.1.weight") and t.contains("llm_adapter."),
    ),
    Architecture("cosmos", "a Cosmos-Predict2 denoiser", lambda t: t.has("blocks.0.adaln_modulation_self_attn.1.weight")),
    Architecture(
        "wan",
        "a Wan denoiser",
        lambda t: t.rank("patch_embedding.weight") == 5 and t.has("blocks.0.self_attn.norm_q.weight"),
        _wan_detail,
    ),
    Architecture(
        "sd3",
        "a Stable Diffusion 3 denoiser",
        lambda t: t.has("transformer_blocks.0.attn.add_k_proj.weight", "pos_embed.proj.weight"),
        layout="diffusers",
    ),
    Architecture(
        "sdxl",
        "an SDXL U-Net",
        lambda t: t.has("down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"),
        layout="diffusers",
    ),
    Architecture("sd2", "a Stable Diffusion 2 U-Net", lambda t: t.size(DIFFUSERS_CROSS, 1) == 1024, layout="diffusers"),
    Architecture("sd1", "a Stable Diffusion 1 U-Net", lambda t: t.has(DIFFUSERS_CROSS), layout="diffusers"),
)

VAES: tuple[Architecture, ...] = (
    Architecture(
        "vae_hunyuan_image",
        "a HunyuanImage autoencoder",
        lambda t: t.has("encoder.down.0.block.0.norm1.weight") and t.contains("encoder.down.5."),
    ),
    Architecture(
        "vae_sd",
        "a Stable Diffusion autoencoder",
        lambda t: t.has("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"),
        lambda t: f"{t.size('decoder.conv_in.weight', 1)} latent channels",
    ),
    Architecture(
        "vae_flux",
        "a FLUX.1 or SD3 autoencoder",
        lambda t: t.has("encoder.down.0.block.0.norm1.weight"),
        lambda t: f"{t.size('decoder.conv_in.weight', 1)} latent channels",
    ),
    Architecture("vae_wan", "a Wan or Qwen-Image autoencoder", lambda t: t.has("encoder.downsamples.0.residual.0.gamma")),
    Architecture(
        "vae_wan",
        "a Wan or Qwen-Image autoencoder",
        lambda t: t.rank("encoder.down_blocks.0.conv1.weight") == 5 and t.rank("quant_conv.weight") == 5,
        layout="diffusers",
    ),
    Architecture(
        "vae_hunyuan_video",
        "a HunyuanVideo autoencoder",
        lambda t: t.rank("encoder.down_blocks.0.resnets.0.conv1.conv.weight") == 5,
    ),
    Architecture(
        "vae_sd",
        "a Stable Diffusion autoencoder",
        lambda t: t.has("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
        layout="diffusers",
    ),
    Architecture(
        "vae_flux",
        "a FLUX.1 or SD3 autoencoder",
        lambda t: t.has("encoder.down_blocks.0.resnets.0.conv1.weight"),
        lambda t: f"{t.size('decoder.conv_in.weight', 1)} latent channels",
        "diffusers",
    ),
)


def _clip_width(table: KeyTable) -> int | None:
    """Width of a CLIP text encoder in the names of transformers; version 5 leaves `text_model.` out."""
    names = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
    return next((width for name in names if (width := table.size(name, 1)) is not None), None)


TEXT_ENCODERS: tuple[Architecture, ...] = (
    Architecture("clip_g", "a CLIP-G text encoder", lambda t: _clip_width(t) == 1280),
    Architecture("clip_h", "a CLIP-H text encoder", lambda t: _clip_width(t) == 1024),
    Architecture(
        "clip_l",
        "a CLIP-L text encoder",
        lambda t: _clip_width(t) is not None,
        lambda t: f"width {_clip_width(t)}, {t.count('encoder.layers.{}.')} layers",
    ),
    Architecture(
        "clip_g",
        "a CLIP-G text encoder",
        lambda t: t.contains("transformer.resblocks.0.attn.in_proj_weight") and t.size("token_embedding.weight", 1) == 1280,
        layout="open_clip",
    ),
    Architecture(
        "clip_h", "a CLIP text encoder", lambda t: t.contains("transformer.resblocks.0.attn.in_proj_weight"), layout="open_clip"
    ),
    Architecture(
        "umt5",
        "a UMT5 text encoder",
        lambda t: (
            t.has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")
            or t.has("blocks.0.pos_embedding.embedding.weight", "token_embedding.weight")
        ),
    ),
    Architecture(
        "byt5",
        "a ByT5 text encoder",
        lambda t: t.contains("encoder.block.0.layer.0.SelfAttention.q.weight") and t.size("shared.weight", 0) in (384, 1510),
    ),
    Architecture(
        "t5",
        "a T5 text encoder",
        lambda t: t.has("encoder.block.0.layer.0.SelfAttention.q.weight"),
        lambda t: f"width {t.size('encoder.block.0.layer.0.SelfAttention.q.weight', 1)}, {t.count('encoder.block.{}.')} layers",
    ),
    Architecture("t5", "a T5 text encoder", lambda t: t.has("enc.blk.0.attn_q.weight"), layout="GGUF names"),
    Architecture("qwen25_vl", "a Qwen2.5-VL model", lambda t: t.contains("visual.blocks.0.", "layers.0.self_attn.q_proj.bias")),
    Architecture("qwen3", "a Qwen3 text encoder", lambda t: t.has("layers.0.self_attn.q_norm.weight")),
    Architecture("gemma2", "a Gemma 2 text encoder", lambda t: t.has("layers.0.pre_feedforward_layernorm.weight")),
    Architecture(
        "llama", "a LLaMA language model", lambda t: t.has("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")
    ),
    Architecture("siglip", "a SigLIP image encoder", lambda t: t.has("vision_model.head.probe")),
    Architecture(
        "clip_vision",
        "a CLIP image encoder",
        lambda t: t.has("vision_model.embeddings.class_embedding") or t.contains("visual.cls_embedding"),
    ),
)

ADAPTER_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("HunyuanImage or HunyuanVideo", ("double_blocks_0_img_mlp_fc1", "double_blocks.0.img_mlp.fc1", "individual_token_refiner")),
    ("FLUX.1 or Chroma", ("double_blocks_", "single_blocks_", "double_blocks.", "single_blocks.", "single_transformer_blocks")),
    ("Stable Diffusion 3", ("joint_blocks",)),
    (
        "SDXL",
        (
            "lora_te2_", "input_blocks_", "text_encoder_2.", "attentions_0_transformer_blocks_1_", "attentions_1_transformer_blocks_1_",
            "attentions.0.transformer_blocks.1.", "attentions.1.transformer_blocks.1.", ".1.transformer_blocks.1.",
        ),
    ),
    ("Stable Diffusion 1 or 2", ("lora_unet_down_blocks", "lora_te_text_model", "unet.down_blocks")),
    ("Lumina-Image 2.0", ("noise_refiner", "context_refiner", "_attention_qkv")),
    (
        "Anima",
        (
            "llm_adapter", "adaln_modulation", "cross_attn_output_proj", "self_attn_output_proj", "mlp_layer1", "mlp.layer1", "mlp_layer2",
            "mlp.layer2",
        ),
    ),
    ("Wan", ("blocks_0_self_attn", "blocks.0.self_attn", "blocks_0_cross_attn")),
)
"""parts of adapter keys -> the family they are made for; the first match wins"""
ANIMA_ATTENTION = re.compile(r"(^|[_.])blocks[_.]\d+[_.](self|cross)_attn[_.]([qkv]_proj|output_proj|[qkv]_norm)\.")
"""names of attention layers that no other family has: those of text encoders stand in `layers`, those of Wan are q, k, v"""


DENOISER_KINDS = frozenset(architecture.kind for architecture in DENOISERS)


def is_adapter(table: KeyTable) -> bool:
    return holds_adapter(table.shapes)


def adapter_family(table: KeyTable) -> str | None:
    """The family that an adapter file was made for, or None when its names do not tell."""
    width = _unet_text_width(table)
    if width in UNET_TEXT_WIDTHS:
        return UNET_TEXT_WIDTHS[width]
    if any(ANIMA_ATTENTION.search(key) for key in table.shapes):
        return "Anima"
    return next((family for family, parts in ADAPTER_FAMILIES if any(table.contains(part) for part in parts)), None)


UNET_TEXT_WIDTHS = {768: "Stable Diffusion 1 or 2", 1024: "Stable Diffusion 1 or 2", 2048: "SDXL"}
"""width of the text that cross-attention reads: adapters of these U-Nets have the same names otherwise"""


def _unet_text_width(table: KeyTable) -> int | None:
    """Inputs of a cross-attention layer of a U-Net's adapter; None when there is none."""
    pattern = r"(^|[._])(down|mid|up|input|output|middle)_blocks?[._].*attn2[._]to_k[._].*(lora_down|lora_A|lora\.down|hada_w1_b)"
    return next((shape[1] for key, shape in table.shapes.items() if len(shape) > 1 and re.search(pattern, key)), None)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Recognised | None:
    """What a file with these tensors is, or None. `shapes` maps names as stored to shapes."""
    table = KeyTable(shapes)
    if is_adapter(table):
        family = adapter_family(table)
        return Recognised("adapter", f"a LoRA-type adapter for {family}" if family else "a LoRA-type adapter", "adapter")
    if "emb_params" in shapes or ({"clip_l", "clip_g"} & set(shapes) and len(shapes) <= 4):
        return Recognised("embedding", "a textual inversion embedding", "embedding")
    for architecture in (*DENOISERS, *VAES, *TEXT_ENCODERS):
        if architecture.test(table):
            detail = architecture.detail(table)
            whole = table.is_whole_file and architecture in DENOISERS
            parts = [
                detail,
                "with its VAE or text encoders in one file" if whole else "",
                f"{architecture.layout} names" if architecture.layout != "original" else "",
            ]
            told = ", ".join(part for part in parts if part)
            return Recognised(
                architecture.kind,
                f"{architecture.title} ({told})" if told else architecture.title,
                "whole file" if whole else architecture.layout,
            )
    return None
