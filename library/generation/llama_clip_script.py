"""What the video scripts share whose captions LLaMA and CLIP-L read, and which share a causal video
autoencoder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from library.core.options import Config
from library.generation.video_script import VideoScript
from library.training.wiring.base import part_of, tokenizer_problems

if TYPE_CHECKING:
    from torch import Tensor, nn


class LlamaClipScript(VideoScript):
    """`models` is a LlamaClipModelOptions."""

    encoder_slots = (("text_encoder1", {"llama"}), ("text_encoder2", {"clip_l"}))

    def load_encoders(self, config: Config) -> list[nn.Module]:
        import torch

        from library.components.llama_clip_utils import load_encoders

        options = config[self.models]
        dtype = getattr(torch, options.text_encoder_name)
        if self.text_device(config).type == "cpu" and dtype == torch.float16:
            dtype = torch.bfloat16
        return load_encoders(
            *self.encoder_files(config), dtype, "cpu", self.disable_mmap(config),
            form="fp8" if options.fp8_llm else None
        )

    @staticmethod
    def disable_mmap(config: Config) -> bool:
        """Whether files are read without mapping them into memory."""
        return bool(config.value("disable_numpy_memmap"))

    def encoder_files(self, config: Config) -> tuple[str, str]:
        """Of both text encoders; the second may be in the folder of a pipeline."""
        options = config[self.models]
        return options.text_encoder1, str(part_of(options.text_encoder2, "text_encoder_2"))

    def placed(self, config: Config, denoiser: Any) -> Any:
        """With what the refiner of texts makes multiplied, where --te_multiplier says so."""
        placed, factors = super().placed(config, denoiser), config[self.models].te_multiplier
        if factors is not None:
            pooled, blocks = placed.text_refiner_parts()
            for part, factor in ((pooled, factors[1]), *((block, factors[0]) for block in blocks)):
                part.register_forward_hook(functools.partial(_multiplied, factor))
        return placed

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
            options.vae, dtype, "cpu", self.disable_mmap(config), chunk_frames=options.vae_chunk_size,
            tile_size=options.tile_size,
        )  # fmt: skip

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

        llama, clip_l = self.encoder_files(config)
        tokenize = functools.cache(lambda: self.strategies(config).tokenize)
        found = [
            *tokenizer_problems(
                lambda: tokenize().llama, lambda: inspect_llama(llama)["vocab_size"], "LLaMA",
                "--text_encoder1_tokenizer", f"--text_encoder1 {llama}",
            ),
            *tokenizer_problems(
                lambda: tokenize().clip_l, lambda: inspect_clip_l(clip_l)["vocab"], "CLIP",
                "--text_encoder2_tokenizer", f"--text_encoder2 {clip_l}",
            ),
        ]  # fmt: skip
        return list(dict.fromkeys(found))


def _multiplied(factor: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return output * factor
