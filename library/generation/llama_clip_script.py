"""What the video scripts share whose captions LLaMA and CLIP-L read, and which share a causal video
autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.core.options import Config
from library.generation.video_script import VideoScript
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    from torch import nn


class LlamaClipScript(VideoScript):
    """`models` is a LlamaClipOptions."""

    encoder_slots = (("text_encoder1", {"llama"}), ("text_encoder2", {"clip_l"}))

    def load_encoders(self, config: Config) -> list[nn.Module]:
        import torch

        from library.components.llm_encoder_utils import load_llama
        from library.components.text_encoder_utils import load_clip_l
        from library.fp8_optimization_utils import shrink_linears_to_fp8

        options = config[self.models]
        dtype = getattr(torch, options.text_encoder_name)
        if self.text_device(config).type == "cpu" and dtype == torch.float16:
            dtype = torch.bfloat16
        llama = load_llama(options.text_encoder1, dtype, "cpu")
        if options.fp8_llm:
            shrink_linears_to_fp8(llama)
        return [llama, load_clip_l(options.text_encoder2, dtype, "cpu")]

    def load_vae(self, config: Config) -> nn.Module:
        import torch

        from library.components.hunyuan_vae_utils import load_hunyuan_vae
        from library.generation.requests import DTYPE_NAMES
        from library.generation.video_script import device_of

        options = config[self.models]
        dtype = getattr(torch, DTYPE_NAMES[options.vae_dtype.lower()])
        if device_of(options).type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # a CPU has no convolutions of float16 worth their time
        return load_hunyuan_vae(
            options.vae, dtype, "cpu", chunk_frames=options.vae_chunk_size, tile_size=options.tile_size
        )

    def tokenizer_files(self, config: Config) -> tuple[Any, ...]:
        """Arguments of the family's tokenize strategy."""
        options = config[self.models]
        return (
            options.tokenizer_cache_dir, options.text_encoder1_tokenizer, options.text_encoder2_tokenizer,
            options.text_encoder1,
        )  # fmt: skip

    def tokenizer_problems(self, config: Config) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the models do not have."""
        from library.components.llm_encoder_utils import inspect_llama
        from library.components.text_encoder_utils import inspect_clip_l

        options = config[self.models]
        tokenize = self.strategies(config).tokenize
        return [
            *tokenizer_problems(
                lambda: tokenize.llama, lambda: inspect_llama(options.text_encoder1)["vocab_size"], "LLaMA",
                "--text_encoder1_tokenizer", f"--text_encoder1 {options.text_encoder1}",
            ),
            *tokenizer_problems(
                lambda: tokenize.clip_l, lambda: inspect_clip_l(options.text_encoder2)["vocab"], "CLIP",
                "--text_encoder2_tokenizer", f"--text_encoder2 {options.text_encoder2}",
            ),
        ]  # fmt: skip
