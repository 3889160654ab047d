"""SDXL."""

from __future__ import annotations

from library.families.latent_colours import KL_F8C4_XL
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

FAMILY = FamilyRecord(
    name="sdxl",
    title="SDXL",
    prefix="sdxl_",
    page="docs/sdxl_train_network.md",
    scripts={
        "full": OtherScript(
            name="sdxl_train",
            options=frozenset(
                {
                    "train_text_encoder", "learning_rate_te1", "learning_rate_te2", "stop_text_encoder_training",
                    "block_lr", "fused_optimizer_groups", "diffusers_xformers",
                }
            ),
        ),
        "textual_inversion": OtherScript(name="sdxl_train_textual_inversion"),
        "control_net": OtherScript(name="sdxl_train_control_net", defaults={"control_net_lr": 1e-4}),
        "lllite": OtherScript(name="sdxl_train_control_net_lllite"),
    },
    place=30,
    family="library.training.wiring.sdxl:SdxlFamily",
    denoisers=("SdxlUNet2DConditionModel",),
    targets="networks.lora_sdxl:TARGETS",
    pipeline="library.generation.sdxl_pipeline:SdxlPipeline",
    control_nets="library.sdxl_utils:CONTROL_NETS",
    pictures="sdxl_gen_img.py",
    image_script="library.generation.sdxl_inference:SCRIPT",
    tiny=(TinyModel(name="sdxl", title="SDXL", build="library.tiny_models.sdxl_tiny:build_tiny_sdxl"),),
    latent_colours=KL_F8C4_XL,
    latents=LatentSpec(channels=4, spatial_stride=8, fingerprint="ldm-f8c4"),
    bucket_step=32,
    caches=CacheNames(latents="_sdxl.npz", text="_te_outputs.npz", legacy_keys=True),
    conditioning=(
        TextKey("hidden_state1", encoders=(0,)),
        TextKey("hidden_state2", encoders=(1,)),
        TextKey("pool2", rank=1, encoders=(1,)),
    ),
    foreign_text="their pooled captions (pool2) may have gone through the transposed text_projection",
    embedding_keys=("clip_l", "clip_g"),
    samples=SampleDefaults(512, 8, {"sample_steps": 30, "scale": 7.5}, reads=frozenset({"sample_sampler", "sigma_table"})),
    autoencoders={"vae_sd": "vae_sdxl"},
    model_kinds=(
        ModelKind(
            name="sdxl",
            wanted="an SDXL checkpoint or diffusers folder",
            subfolder="unet",
            base_version="sdxl_base_v1-0",
            modelspec="stable-diffusion-xl-v1-base",
            signatures=(
                Signature(title="an SDXL checkpoint", has=("input_blocks.0.0.weight", "label_emb.0.0.weight"), priority=20),
                Signature(
                    title="an SDXL U-Net",
                    has=("down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"), layout="diffusers",
                    priority=20,
                ),
            ),
        ),
        ModelKind(
            name="sdxl_controlnet",
            role="relative",
            wanted="a ControlNet of SDXL",
            script="control_net",
            subfolder="controlnet",
            layouts="library.components.unet_control_net_utils:LAYOUTS",
            signatures=(
                Signature(
                    title="a ControlNet of SDXL", has=("input_hint_block.0.weight", "label_emb.0.0.weight"), priority=88
                ),
                Signature(
                    title="a ControlNet of SDXL",
                    has=("controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight"),
                    layout="diffusers", priority=88,
                ),
            ),
        ),
        ModelKind(
            name="sdxl_refiner",
            role="relative",
            signatures=(
                Signature(
                    title="an SDXL refiner", has=("input_blocks.0.0.weight",),
                    sizes=(("label_emb.0.0.weight", 1, (2560,)),), priority=70
                ),
            ),
        ),
    ),
    adapters=AdapterFacts(
        title="SDXL",
        parts=(
            "lora_te2_", "input_blocks_", "text_encoder_2.", "attentions_0_transformer_blocks_1_",
            "attentions_1_transformer_blocks_1_",
            "attentions.0.transformer_blocks.1.", "attentions.1.transformer_blocks.1.", ".1.transformer_blocks.1.",
        ),
        priority=30,
        text_widths=(2048,),
        base_versions=("sdxl",),
        modelspec=("stable-diffusion-xl",),
    ),
)  # fmt: skip
