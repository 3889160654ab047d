"""SDXL's models as other trainers call them; see docs/public_names.md."""

from library.compat.sdxl_names import (  # noqa: F401
    MODEL_VERSION_SDXL_BASE_V1_0, VAE_SCALE_FACTOR, convert_diffusers_unet_state_dict_to_sdxl,
    convert_sdxl_text_encoder_2_checkpoint,
    convert_sdxl_unet_state_dict_to_diffusers, convert_text_encoder_2_state_dict_to_sdxl,
    load_models_from_sdxl_checkpoint,
    save_diffusers_checkpoint, save_stable_diffusion_checkpoint,
)  # fmt: skip
