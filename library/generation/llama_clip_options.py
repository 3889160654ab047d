"""What the video scripts are asked whose captions LLaMA and CLIP-L read, and which share a causal video autoencoder:
options without torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.options import option
from library.generation.requests import DTYPE_NAMES, too_small_problems
from library.generation.video_options import VideoModelOptions

LEAST_TILE = 32
TILE = 256
"""pixels of a side of tiles, and of their steps, in which known scripts let the autoencoder decode"""


@dataclass(frozen=True, kw_only=True)
class LlamaClipModelOptions(VideoModelOptions):
    """Models

    A family has further ones.
    """

    vae: str | None = option(None, help="file of the causal video autoencoder")
    text_encoder1: str | None = option(None, help="file or folder of LLaMA 3, the language part of llava-llama-3-8b")
    text_encoder2: str | None = option(None, help="file or folder of the CLIP-L text encoder")
    text_encoder1_tokenizer: str | None = option(None, help="folder of the LLaMA tokenizer")
    text_encoder2_tokenizer: str | None = option(None, help="folder of the CLIP tokenizer")
    text_encoder_dtype: str = option("float16", help="number format of the text encoders; on a CPU bfloat16 stands for"
                                     " float16")  # fmt: skip
    fp8_llm: bool = option(False, help="keep the matrices of LLaMA in 8 bits")
    vae_dtype: str = option("float16", help=f"number format of the autoencoder: {', '.join(DTYPE_NAMES)}")
    vae_chunk_size: int | None = option(
        None, help="frames that convolutions of the autoencoder compute at once: less memory, equal results"
    )
    vae_tiling: bool = option(
        True, help=f"let the autoencoder compute frames above {TILE} pixels in tiles: less memory, close results"
    )
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help=f"pixels of a side of these tiles, a multiple of 8; {TILE} when not given"
    )
    disable_numpy_memmap: bool = option(False, help="read model files without mapping them into memory")
    te_multiplier: list[float] | None = option(
        None, nargs=2, metavar="NUMBER", help="factors of what the denoiser's refiner of texts makes of LLaMA's states"
        " (after each of its blocks) and of the caption as a whole",
    )  # fmt: skip
    split_attn: bool = option(False, help="one attention call for each sample, over the tokens that its mask leaves")

    def model_problems(self) -> list[str]:
        found = [*super().model_problems(), *too_small_problems(self, ("vae_chunk_size", 1))]
        size = self.vae_spatial_tile_sample_min_size
        if size is not None and (size < LEAST_TILE or size % 8):
            found.append(
                f"--vae_spatial_tile_sample_min_size is {size}; needed: a multiple of 8 and at least {LEAST_TILE}"
            )
        if self.text_encoder_dtype.lower() not in DTYPE_NAMES or self.text_encoder_name.startswith("float8"):
            found.append(
                f"--text_encoder_dtype is '{self.text_encoder_dtype}'; needed: float32, float16 or bfloat16"
                " (--fp8_llm keeps LLaMA in 8 bits)"
            )
        return found

    @property
    def text_encoder_name(self) -> str:
        return DTYPE_NAMES[self.text_encoder_dtype.lower()]

    @property
    def tile_size(self) -> int | None:
        """Pixels of a side of the tiles in which the autoencoder computes; None = it does not."""
        return self.vae_spatial_tile_sample_min_size or (TILE if self.vae_tiling else None)
