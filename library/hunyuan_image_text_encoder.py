"""Text encoders of HunyuanImage 2.1 as other trainers call them; see docs/public_names.md."""

from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(__name__, homes(
    "library.compat.hunyuan_image_names", "get_byt5_prompt_embeds_from_tokens", "get_byt5_text_tokens",
    "get_glyph_prompt_embeds", "get_qwen_prompt_embeds", "get_qwen_prompt_embeds_from_tokens", "get_qwen_tokens",
    "load_byt5", "load_qwen2_5_vl",
))
