"""VideoFamily: what the families of videos share of their wiring."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from library.core.errors import Problems
from library.core.options import Ignored, without_effect
from library.dataset import CachingOptions
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.option_groups import ModelOptions, NoiseOptions, SamplingOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring import video_options
from library.training.wiring.flow import FlowFamily, ignored_by_flow
from library.training.wiring.video_options import VideoOptions

if TYPE_CHECKING:
    import torch

    from library.training.accelerator_setup import Runtime
    from library.training.objective import Objective
    from library.training.protocols import Plain

PARTS = ("vae", "text_encoders")
_IMAGE_MODELS = "it belongs to Stable Diffusion; video models have no such variant"
_PLACES = "an option of scripts for pictures; parts are loaded where they are used, and released after their last use"


class VideoFamily(FlowFamily):
    """A family whose options derive from VideoOptions. Its runs use caches on the disk unless told otherwise, and do
    without the VAE and the text encoders where these are complete and nothing is sampled: then `lacks` says so, and no
    method that needs the files of such a part is called, nor tokenizers of it."""

    options: ClassVar[type[VideoOptions]]
    loading_options: ClassVar[Mapping[str, tuple[str, ...]]] = {"vae": ("vae_dtype",)}
    """part -> options that say how it is loaded, and nothing of what it makes"""
    embedders_wait: ClassVar[bool] = False
    """whether its denoiser takes --img_in_txt_in_offloading"""
    denoiser_option = "dit"
    defaults = video_options.DEFAULTS
    stands_for = video_options.STANDS_FOR
    attention_switches = video_options.ATTENTION_SWITCHES
    refused = {"weighted_captions": "no video model is trained with weighted words"}
    foreign = {
        **ignored_by_flow("a video model"),
        "v2": _IMAGE_MODELS,
        "v_parameterization": "video models predict the velocity of their flow in any case",
        "clip_skip": "video models take a fixed layer of their text encoders",
        "lowram": _PLACES,
        "highvram": _PLACES,
        "mem_eff_attn": "an option of scripts for pictures; attention is computed by torch (--sdpa)",
        "skip_until_initial_step": "an option of scripts for pictures; a run goes on at the exact batch of its first"
        " step",
        "max_token_length": "it counts CLIP tokens of Stable Diffusion; video models have lengths of their own",
    }

    @classmethod
    def following_defaults(cls, values: Mapping[str, object]) -> Mapping[str, object]:
        return video_options.following_defaults(values)

    @abstractmethod
    def part_files(self, part: str) -> Mapping[str, str | None]:
        """The options that name the files of a part, "vae" (with what encodes pictures beside it) or "text_encoders"
        -> what they say."""

    def lacks(self, part: str) -> bool:
        return not any(self.part_files(part).values())

    def check(self) -> None:
        problems = Problems()
        problems.attempt(super().check)
        for problem in [*self._part_needs(), *self._dtype_problems()]:
            problems.add(problem)
        problems.raise_if_any()

    def _part_needs(self) -> list[str]:
        """Parts without files that a run needs whatever the caches hold."""
        from library.training.checks import wants_samples

        caching, sampling = self.config[CachingOptions], self.config[SamplingOptions]
        reasons = dict.fromkeys(PARTS, "it makes the samples of --sample_prompts")
        if not (sampling.sample_prompts and wants_samples(sampling)):
            kept = {
                "vae": (caching.caches_latents, caching.cache_latents_to_disk, "clips"),
                "text_encoders": (caching.caches_text, caching.cache_text_encoder_outputs_to_disk, "captions"),
            }
            reasons = {
                part: f"it encodes the {what} {'at each start, as caches in memory do' if cached else 'in every step'}"
                for part, (cached, on_disk, what) in kept.items()
                if not on_disk
            }
        return [
            f"--{option} is not given; needed: {reason}"
            for part, reason in reasons.items()
            if self.lacks(part)
            for option in self.part_files(part)
        ]

    def _dtype_problems(self) -> list[str]:
        wanted, precision = self.opts.dit_dtype, self.config[PrecisionOptions]
        computes = {"no": "fp32"}.get(precision.mixed_precision, precision.mixed_precision)
        if wanted in (None, computes) or (wanted == "fp8" and precision.fp8_base_unet):
            return []
        if wanted == "fp8":
            return ["--dit_dtype is fp8; needed: --fp8_base, with which the frozen weights are kept so"]
        return [
            f"--dit_dtype is {wanted} with --mixed_precision {precision.mixed_precision}; the denoiser is kept in the"
            f" format in which it computes: needed: --mixed_precision {'no' if wanted == 'fp32' else wanted}"
        ]

    def vae_dtype(self, runtime: Runtime) -> torch.dtype:
        """That of --vae_dtype, or else of the run."""
        from library.training.accelerator_setup import DTYPES

        wanted = self.opts.vae_dtype
        return runtime.vae_dtype if wanted is None else DTYPES["no" if wanted == "fp32" else wanted]

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def placed_denoiser(self, load: Callable[..., Any], path: str | None, runtime: Runtime) -> Any:
        """A denoiser's file, read by the loader of the family, on the device, or with block swap spread over device and
        main memory."""
        denoiser = load(
            path, runtime.denoiser_dtype, self.loading_place(runtime), self._disable_mmap, form=runtime.denoiser_form,
            by_rows=self.config[PrecisionOptions].multiplies_fp8, transform=self.transform,
        )  # fmt: skip
        return self.placed(denoiser, runtime)

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def _vae_path(self) -> str | None:
        return self.config[ModelOptions].vae

    def idle(self) -> list[Ignored]:
        given = ["img_in_txt_in_offloading"] if self.opts.img_in_txt_in_offloading and not self.embedders_wait else []
        how = "the known script takes it and does nothing with it; --blocks_to_swap saves memory"
        found = without_effect(given, how)
        for part, names in self.loading_options.items():
            if self.lacks(part):
                names = (*names, *(["quantize_text_encoder"] if part == "text_encoders" else []))
                unread = [name for name in names if name in self.config.explicit]
                files = " and ".join(f"--{name}" for name in self.part_files(part))
                found += without_effect(unread, f"what is made by {files} is in the caches")
        return found

    def _notices(self) -> list[str]:
        return ["the time reaches the network in float32, as 1000 sigma (known trainers add 1)"]

    def objective(self) -> Objective:
        """Velocity, weighted by `--weighting_scheme` at whole timesteps, as known trainers weigh it."""
        from library.training.objective import FlowMatchingObjective

        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target="velocity", weigh=True, by_table=True
        )

    def timestep_metadata(self) -> dict[str, Plain]:
        """The ss_* keys of noise levels, guidance and memory as the known trainer of videos writes them, for
        `metadata`."""
        times, memory = self.config[TimestepOptions], self.config[MemoryOptions]
        names = (
            "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "timestep_sampling", "sigmoid_scale",
            "discrete_flow_shift",
        )  # fmt: skip
        return {
            **{f"ss_{name}": getattr(times, name) for name in names},
            "ss_guidance_scale": self.opts.guidance_scale,
            "ss_gradient_checkpointing_cpu_offload": memory.gradient_checkpointing and memory.cpu_offload_checkpointing,
            "ss_fp8_base": self.config[PrecisionOptions].fp8_base_unet,  # for which --fp8_base stands
        }
