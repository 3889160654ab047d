"""Files of Lumina-Image 2.0 as other trainers call them; see docs/public_names.md."""

from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(__name__, {
    **homes(
        "library.compat.lumina_names", "convert_diffusers_sd_to_alpha_vllm", "load_ae", "load_gemma2",
        "load_lumina_model",
    ),
    **homes("library.flux_utils", "pack_latents", "unpack_latents"),
})
