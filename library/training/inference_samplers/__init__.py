"""Samplers that make images: the option and the table.

A sampler is a function `(denoise, latents, sigmas, generator) -> latents`. `denoise(latents, sigma)` gives the derivative
of the latents with respect to sigma from the network's prediction: the velocity noise - data in flow matching. `sigmas`
[n + 1] run down to 0; `generator` feeds samplers that add noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from library.errors import ConfigError, did_you_mean
from library.options import option
from library.registry import Registry

SAMPLER_NAMES = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)
"""names that --sample_sampler and prompt files may use; a family says which of them it has"""
DEFAULT_SAMPLER = "ddim"

INFERENCE_SAMPLERS: Registry[Callable] = Registry("sampler", option="sample_sampler")
INFERENCE_SAMPLERS.add("euler", "library.training.inference_samplers.flow:euler")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Sampler of the sample images."""

    sample_sampler: str = option(
        DEFAULT_SAMPLER, choices=SAMPLER_NAMES,
        help="sampler of the sample images; flow models (FLUX.1) always use their own Euler sampler",
    )

    def __post_init__(self) -> None:
        if self.sample_sampler not in SAMPLER_NAMES:
            raise ConfigError(
                f"--sample_sampler is '{self.sample_sampler}'{did_you_mean(self.sample_sampler, SAMPLER_NAMES)}"
                f" Known: {', '.join(SAMPLER_NAMES)}"
            )
