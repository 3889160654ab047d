"""What image scripts are asked whose pictures can be written as latents, whichever family they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, LARGEST_STEPS, option
from library.core.text_seeds import seed_of
from library.generation.requests import DTYPE_NAMES, OUTPUT_TYPES, dtype_problem, too_small_problems
from library.generation.speed_options import attention_option, fast_products_option, scaled_weights_option
from library.training.sampling_prompts import DRAWN


@dataclass(frozen=True, kw_only=True)
class DitOptions:
    """Models

    A family has further ones, and says in its own words which files it wants.
    """

    dit: str | None = option(None, help="file of the denoiser")
    vae: str | None = option(None, help="file of the autoencoder")
    text_encoder: str | None = option(None, help="file or folder of the text encoder")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    fp8: bool = option(False, help="keep the large matrices of the denoiser in 8 bits, as they are")
    fp8_scaled: bool = scaled_weights_option()
    fp8_fast: bool = fast_products_option()
    text_encoder_cpu: bool = option(False, help="let the text encoders compute on the CPU")
    device: str | None = option(
        None, help="device of the denoiser, e.g. cuda:1; the first GPU when not given, else the CPU"
    )
    attn_mode: str = attention_option()

    def format_problems(self) -> list[str]:
        """What is wrong with --dtype."""
        unknown = dtype_problem("dtype", self.dtype)
        if unknown:
            return [unknown]
        if self.dtype_name.startswith("float8"):
            return [f"--dtype is {self.dtype}; 8 bits are for the denoiser only: --fp8 or --fp8_scaled"]
        return []

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class LatentPictureOptions:
    """Pictures"""

    size_step: ClassVar[int]
    """what both sides of a picture are rounded down to a multiple of"""

    prompt: str | None = option(None, help="what the picture shows")
    negative_prompt: str = option("", help="what it should not show")
    image_size: tuple[int, ...] = option(
        (1024, 1024), nargs=2, metavar="PIXELS", help="height and width", most=LARGEST_PICTURE_SIDE
    )
    infer_steps: int = option(50, help="steps", most=LARGEST_STEPS)
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1 = off, else two forwards per step")
    flow_shift: float = option(5.0, help="how far the steps lie towards noise; 1 = evenly spaced")
    seed: int | None = option(
        None, convert=seed_of, help="number, or any text, that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    save_path: str | None = option(None, help="folder of the pictures; made when missing")
    output_type: str = option(
        "images", choices=OUTPUT_TYPES, help="what is written: pictures, latents (safetensors), or both"
    )
    latent_path: list[str] | None = option(None, nargs="*", help="decode these latents instead of making new ones")

    def picture_problems(self) -> list[str]:
        """What is out of range or contradicts itself."""
        problems = too_small_problems(self, ("infer_steps", 1), ("seed", DRAWN))
        if len(self.image_size) != 2 or min(self.image_size) < self.size_step:
            size = " ".join(map(str, self.image_size))
            problems.append(f"--image_size is {size}; needed: height and width, {self.size_step} or more each")
        if not self.flow_shift > 0:
            problems.append(f"--flow_shift is {self.flow_shift}; needed: a number above 0")
        if self.latent_path and self.output_type != "images":
            problems.append(
                f"--output_type is {self.output_type} and --latent_path gives latents already; use --output_type images"
            )
        return problems

    @property
    def output_dir(self) -> str | None:
        return self.save_path
