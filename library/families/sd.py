"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any

from library.families.latent_colours import KL_F8C4
from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    FamilyRecord,
    ModelKind,
    OtherScript,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)

_CROSS_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_DIFFUSERS_CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def _control_net(title: str, text_width: int | None = None) -> tuple[Signature, ...]:
    """In both layouts; `text_width` tells one version from the other."""
    return tuple(
        Signature(
            title=title,
            has=has,
            sizes=((cross, 1, (text_width,)),) if text_width else (),
            layout=layout,
            priority=85 if text_width else 80,
        )
        for layout, cross, has in (
            ("original", _CROSS_ATTENTION, ("input_hint_block.0.weight", "zero_convs.0.0.weight")),
            ("diffusers", _DIFFUSERS_CROSS, ("controlnet_cond_embedding.conv_in.weight",)),
        )
    )


FAMILY = FamilyRecord(
    name="sd",
    title="Stable Diffusion 1 and 2",
    page="docs/train_network.md",
    scripts={
        "dreambooth": OtherScript(
            name="train_db",
            options=frozenset({"learning_rate_te", "stop_text_encoder_training", "no_token_padding"}),
        ),
        "full": OtherScript(
            name="fine_tune",
            options=frozenset(
                {"train_text_encoder", "learning_rate_te", "stop_text_encoder_training", "diffusers_xformers"}
            ),
        ),
        "textual_inversion": OtherScript(name="train_textual_inversion"),
        "control_net": OtherScript(name="train_control_net", options=frozenset({"conditioning_range"})),
        "textual_inversion_xti": OtherScript(name="train_textual_inversion_XTI"),
    },
    place=20,
    family="library.training.wiring.sd:SdFamily",
    denoisers=("UNet2DConditionModel",),
    targets="networks.lora_sd:TARGETS",
    pipeline="library.generation.sd_pipeline:SdPipeline",
    control_nets="library.sd_utils:CONTROL_NETS",
    pictures="gen_img.py",
    tiny=(
        TinyModel(name="sd1", title="Stable Diffusion 1", build="library.tiny_models.sd_tiny:build_tiny_sd1"),
        TinyModel(
            name="sd2",
            title="Stable Diffusion 2, velocity prediction",
            build="library.tiny_models.sd_tiny:build_tiny_sd2",
            options=("--v_parameterization",),
        ),
    ),
    latent_colours=KL_F8C4,
    latents=LatentSpec(channels=4, spatial_stride=8, fingerprint="ldm-f8c4"),
    bucket_step=64,
    caches=CacheNames(latents="_sd.npz", legacy_keys=True),
    conditioning=(TextKey("hidden_state", encoders=(0,)),),
    embedding_keys=("emb_params",),
    samples=SampleDefaults(512, 8, {"sample_steps": 30, "scale": 7.5}, reads=frozenset({"sample_sampler", "sigma_table"})),
    autoencoders={"vae_sd": "vae_sd1"},
    model_kinds=(
        ModelKind(
            name="sd1",
            wanted="a Stable Diffusion 1 checkpoint or diffusers folder",
            subfolder="unet",
            base_version="sd_v1",
            modelspec="stable-diffusion-v1",
            metadata={"ss_v2": "False"},
            signatures=(
                Signature(
                    title="a Stable Diffusion 1 checkpoint",
                    has=(_CROSS_ATTENTION,),
                    detail="library.families.sd:channels",
                ),
                Signature(title="a Stable Diffusion 1 U-Net", has=(_DIFFUSERS_CROSS,), layout="diffusers"),
            ),
        ),
        ModelKind(
            name="sd2",
            wanted="a Stable Diffusion 2 checkpoint or diffusers folder",
            subfolder="unet",
            base_version="sd_v2",
            modelspec="stable-diffusion-v2",
            metadata={"ss_v2": "True"},
            signatures=(
                Signature(
                    title="a Stable Diffusion 2 checkpoint",
                    sizes=((_CROSS_ATTENTION, 1, (1024,)),),
                    detail="library.families.sd:channels",
                    priority=10,
                ),
                Signature(
                    title="a Stable Diffusion 2 U-Net",
                    sizes=((_DIFFUSERS_CROSS, 1, (1024,)),),
                    layout="diffusers",
                    priority=10,
                ),
            ),
        ),
        ModelKind(
            name="sd1_controlnet",
            role="relative",
            wanted="a ControlNet of Stable Diffusion 1",
            script="control_net",
            subfolder="controlnet",
            layouts="library.components.unet_control_net_utils:LAYOUTS",
            signatures=_control_net("a ControlNet of Stable Diffusion 1"),
        ),
        ModelKind(
            name="sd2_controlnet",
            role="relative",
            wanted="a ControlNet of Stable Diffusion 2",
            script="control_net",
            subfolder="controlnet",
            layouts="library.components.unet_control_net_utils:LAYOUTS",
            signatures=_control_net("a ControlNet of Stable Diffusion 2", text_width=1024),
        ),
        ModelKind(
            name="vae_sd",
            role="vae",
            wanted="a Stable Diffusion autoencoder",
            subfolder="vae",
            signatures=(
                Signature(
                    title="a Stable Diffusion autoencoder",
                    has=("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"),
                    detail="library.checkpoints.recognition:latent_channels",
                    priority=10,
                ),
                Signature(
                    title="a Stable Diffusion autoencoder",
                    has=("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
                    layout="diffusers",
                    priority=10,
                ),
            ),
        ),
    ),
    wanted_denoiser="a Stable Diffusion 1 or 2 checkpoint or diffusers folder",
    adapters=AdapterFacts(
        title="Stable Diffusion 1 or 2",
        parts=("lora_unet_down_blocks", "lora_te_text_model", "unet.down_blocks"),
        priority=20,
        text_widths=(768, 1024),
        aliases=("sd1", "sd2", "sd15", "sd21"),
        base_versions=("sd_v",),
        modelspec=("stable-diffusion-v1", "stable-diffusion-v2"),
    ),
)


def channels(table: Any) -> str:
    """What the first layer of a U-Net says, of a KeyTable."""
    count = table.size("input_blocks.0.0.weight", 1)
    return {9: "inpainting, 9 input channels", 8: "image editing, 8 input channels"}.get(count or 4, "")
