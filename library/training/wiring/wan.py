"""Wan 2.1 and 2.2: options and wiring. Numerics are in wan_train_utils, loading in wan_utils, text and conditions in
strategy_wan, tasks in families/wan_tasks."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import Ignored, equivalent_option, number_or_none, option, without_effect
from library.families.wan import FAMILY
from library.families.wan_tasks import DEFAULT_TASK, TASKS, WanTask, boundary_of, task_of_caches
from library.training.option_groups import ModelOptions
from library.training.timestep_samplers import TimestepOptions, build
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.video import VideoFamily
from library.training.wiring.video_options import VideoOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.denoisers import DenoiserInfo
    from library.dataset.batch import Batch
    from library.dataset.items import ImageItem
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.generation.pipeline import PicturePipeline
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt
    from library.training.timestep_samplers import TimestepSampler

logger = logging.getLogger(__name__)

WHOLE_RANGE = (0, 1000)
EXPERT_OPTIONS = ("timestep_boundary", "offload_inactive_dit", "adapter_per_expert")
"""about two experts alone"""
HIGH = "_high"
"""behind the name of the adapter of the expert for much noise, where it has one of its own"""


@dataclass(frozen=True, kw_only=True)
class WanOptions(VideoOptions):
    """Wan"""

    task: str | None = option(
        None, choices=(None, *TASKS),
        help="what the model does; by the denoiser's file when not given, which does not tell kinds of control models"
        " apart",
    )
    t5: str | None = option(None, help="file of the umT5-XXL text encoder (models_t5_umt5-xxl-enc-bf16.pth)")
    t5_tokenizer: str | None = option(None, help="folder or file of the umT5 tokenizer")
    fp8_t5: bool = option(False, help="keep the matrices of the umT5 text encoder in 8 bits")
    clip: str | None = option(
        None, help="file of the CLIP vision encoder, for Wan 2.1 with pictures"
        " (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth)",
    )
    i2v: bool = option(
        False, help="for tools that fill caches without a denoiser: what begins with a first frame, of Wan 2.2 or, with"
        " --clip, of 2.1; --task says the same",
    )
    vae_cache_cpu: bool = option(
        False, help="keep what the VAE remembers between the pieces of a clip in main memory: less memory of the device"
    )
    one_frame: bool = equivalent_option(
        False, help="single frames with others as reference",
        reason="--one_frame: the dataset says which samples are such frames (fp_1f_clean_indices, fp_1f_target_index)",
    )
    force_v2_1_time_embedding: bool = equivalent_option(
        False, help="one time embedding for each sample",
        reason="--force_v2_1_time_embedding: one embedding is made for each distinct time, with as little memory",
    )
    dit_high_noise: str | None = option(
        None, help="file of the second expert of Wan 2.2, for much noise; --dit is the one for little, and one adapter"
        " learns with both",
    )
    timestep_boundary: float | None = option(
        None, convert=number_or_none,
        help="noise level, 0 to 1 or in thousandths, from which the second expert takes over; that of the task when not"
        " given",
    )
    adapter_per_expert: bool = option(
        False, help="learn an adapter for each of two experts, the second one in a file with _high behind its name;"
        " without it, one for both",
    )
    offload_inactive_dit: bool = option(
        False, help="keep the expert that does not compute in main memory; every change of the side moves both"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        if self.timestep_boundary is not None and not 0 < self.timestep_boundary <= 1000:
            problems.add(
                f"--timestep_boundary is {self.timestep_boundary}; needed: above 0, at most 1000, e.g. 0.9 or 900"
            )
        problems.raise_if_any()


class WanFamily(VideoFamily):
    """The wiring of Wan 2.1 and 2.2."""

    record = FAMILY
    denoiser_kinds = ("wan",)
    denoiser_writer = "library.wan_utils:save_wan"
    options = WanOptions
    part_options = {
        "vae": frozenset({"task", "clip", "i2v", "one_frame", "vae_cache_cpu", "vae_dtype"}),
        "text_encoders": frozenset({"t5", "t5_tokenizer", "fp8_t5"}),
    }
    small_text_option = "fp8_t5"
    loading_options = {"vae": ("vae_dtype", "vae_cache_cpu"), "text_encoders": ("fp8_t5",)}
    tool_defaults = {"latents": {"vae_dtype": "bf16"}, "text": {"mixed_precision": "bf16"}}

    _follows_clips = False

    # -- task and files ------------------------------------------------------------------------------------------------

    @cached_property
    def task(self) -> WanTask:
        """By the option, or else by the denoiser's file; without it, by what is to be cached."""
        if self.opts.task is not None:
            return TASKS[self.opts.task]
        if self._denoiser_path is None:
            vision = self.opts.clip is not None
            return TASKS[task_of_caches(first_frame=self.opts.i2v, vision=vision, control=self._follows_clips)]
        from library.wan_fitting_utils import fitting_tasks

        try:
            found = fitting_tasks(self._denoiser_info.params)
        except CheckpointError:  # told by the check
            found = ()
        return found[0] if found else TASKS[DEFAULT_TASK]

    def see_items(self, items: Sequence[ImageItem]) -> None:
        """Control clips are cached where there are some."""
        self._follows_clips = any(item.control_paths and not item.kind.clean_indices for item in items)

    def part_files(self, part: str) -> Mapping[str, str | None]:
        if part == "text_encoders":
            return {"t5": self.opts.t5}
        return {"vae": self._vae_path, **({"clip": self.opts.clip} if self.task.needs_vision else {})}

    def _slot_problems(self, part: str) -> list[str]:
        """Files of a part that are missing or something else."""
        from library.checkpoints.kinds import check_slot

        kinds = {"vae": "vae_wan", "clip": "clip_vision", "t5": "umt5"}
        files = self.part_files(part).items()
        found = [check_slot(file, name, {kinds[name]}, with_pickles=True) for name, file in files]
        return [problem for problem in found if problem]

    def _file_problems(self) -> list[str]:
        """With the task against the denoiser, whatever else is wrong."""
        found, problems = super()._file_problems(), Problems()
        try:
            readable = self._denoiser_path is not None and self._denoiser_info is not None
        except CheckpointError:  # among those found
            readable = False
        if readable:
            problems.attempt(self._check_task)
            problems.attempt(self._check_second_expert)
        return [*problems.messages, *found]

    def _tokenizer_problems(self) -> list[str]:
        """A tokenizer that cannot be found or read, or whose ids the model does not have."""
        from library.wan_text_encoder_utils import inspect_umt5

        return tokenizer_problems(
            lambda: self._tokenizer, lambda: inspect_umt5(self.opts.t5)["vocab_size"], "umT5", "--t5_tokenizer",
            f"--t5 {self.opts.t5}",
        )  # fmt: skip

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from library.strategy_wan import load_umt5_tokenizer

        return load_umt5_tokenizer(
            self.opts.t5_tokenizer, self.config[ModelOptions].tokenizer_cache_dir, self.opts.t5
        )

    @property
    def num_blocks(self) -> int:
        return self._denoiser_info.params.num_layers

    @cached_property
    def _denoiser_info(self) -> DenoiserInfo:
        from library.wan_utils import inspect_wan

        return inspect_wan(self._denoiser_path)

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.components.llama_clip_utils import add_size_problems
        from library.custom_offloading_utils import row_swap_problem
        from library.wan_fitting_utils import part_sizes
        from library.wan_models import WanModel

        params, problems, files = self._denoiser_info.params, Problems(), {}
        if not self.lacks("text_encoders"):
            files["t5"] = self.opts.t5
        if not self.lacks("vae"):
            files |= {"vae": self._vae_path, "clip": self.opts.clip if self.task.needs_vision else None}
        add_size_problems(problems, part_sizes(params, **files), self._denoiser_path)
        swap = row_swap_problem(self.blocks_to_swap, params.num_layers, WanModel.blocks_that_stay)
        return [*problems.messages, swap] if swap else problems.messages

    @cached_property
    def _vision_shape(self) -> tuple[int, int]:
        """(tokens, width) of the vision encoder, by its file, or without one by the denoiser's."""
        if self.opts.clip is None and self._denoiser_path is None:
            return 0, 0  # of a cache tool for a task that looks at no pictures
        if self.opts.clip is None:
            return self._denoiser_info.params.vision_tokens, self._denoiser_info.params.img_dim
        from library.wan_clip_utils import inspect_vision

        values = inspect_vision(self.opts.clip).values
        return 1 + (values["size"] // values["patch"]) ** 2, values["width"]

    def _check_task(self) -> None:
        from library.wan_fitting_utils import check_task

        check_task(self.opts.task, self._denoiser_info.params, self._denoiser_path)

    def _check_second_expert(self) -> None:
        from library.wan_fitting_utils import check_second_expert

        check_second_expert(
            self.opts.dit_high_noise, self.task, self.boundary, self._denoiser_info.params, self._denoiser_path
        )

    @property
    def boundary(self) -> float | None:
        """The noise level from which the second expert predicts; None of one model."""
        given = self.opts.timestep_boundary
        return self.task.boundary if given is None else boundary_of(given)

    @property
    def has_two_experts(self) -> bool:
        return self.opts.dit_high_noise is not None

    @property
    def splits_levels(self) -> bool:
        return self.has_two_experts

    @property
    def second_adapter(self) -> str:
        return HIGH if self.has_two_experts and self.opts.adapter_per_expert else ""

    def check(self) -> None:
        problems = Problems()
        problems.attempt(super().check)
        if self.second_adapter and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
            problems.add(
                "--adapter_per_expert is set, and several processes are started; needed: one process, or one adapter"
                " for both experts: processes may be on different sides of the boundary"
            )
        problems.raise_if_any()

    def _notices(self) -> list[str]:
        from library.strategy_wan import has_ftfy

        lines = [f"the task is {self.task.name}", *super()._notices(), *self._expert_notices()]
        if not has_ftfy():
            lines.append(
                "ftfy is not installed: captions are cleaned of HTML entities and white space alone, not of letters"
                " that were decoded wrongly (pip install ftfy)"
            )
        return lines

    def _expert_notices(self) -> list[str]:
        """Where one expert of two is trained over noise levels that it never sees in use, or takes the other's
        place."""
        says_high, times = "high" in Path(self._denoiser_path).name.lower(), self.config[TimestepOptions]
        if self.has_two_experts:
            swapped = (
                f"--dit is {Path(self._denoiser_path).name}, whose name says much noise; it is the expert for little,"
                " and --dit_high_noise the other one"
            )
            lines = [swapped] if says_high else [
                f"two experts: each step learns on one side of the noise level {self.boundary:g}, drawn by the share of"
                " the noise levels that lie there"
            ]
            uneven = "--num_timestep_buckets: noise levels on the other side are drawn anew, so that no epoch is even"
            return [*lines, uneven] if times.num_timestep_buckets else lines
        ranges = self.task.ranges()
        given = (times.min_timestep or WHOLE_RANGE[0], times.max_timestep or WHOLE_RANGE[1])
        if ranges is None or given != WHOLE_RANGE:
            return []
        low, high = ranges
        least, most = high if says_high else low
        return [
            f"{self.task.name} has two experts, and one is trained, over all noise levels: in use it sees only its own."
            f" Of the one for {'much' if says_high else 'little'} noise these are --min_timestep {least} --max_timestep"
            f" {most} --preserve_distribution_shape"
        ]

    def idle(self) -> list[Ignored]:
        found = super().idle()
        if not self.has_two_experts:
            given = [name for name in EXPERT_OPTIONS if name in self.config.explicit]
            found += without_effect(given, "it is about two experts, and --dit_high_noise is not given")
        if not self.task.needs_vision and "clip" in self.config.explicit:
            found += without_effect(["clip"], f"the task {self.task.name} does not look at a vision encoder")
        if self.opts.i2v and self._denoiser_path is not None:
            found += without_effect(["i2v"], "the task is told by --task or the denoiser's file")
        if "guidance_scale" in self.config.explicit:
            found += without_effect(["guidance_scale"], "no model of Wan has embedded guidance")
        return found

    # -- strategies ----------------------------------------------------------------------------------------------------

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_wan
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        files = [] if self.lacks("text_encoders") else [self.opts.t5]
        text = self.text_cache(trained, files)
        tokenize = None if self.lacks("text_encoders") else strategy_wan.WanTokenizeStrategy(tokenizer=self._tokenizer)
        encoding = strategy_wan.WanTextEncodingStrategy()
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS["wan"])

    def latents_caching(self) -> LatentCache:
        from library.checkpoints.identity import combined_identity, model_identity
        from library.strategy_wan import WanLatentEncoder

        if not self.task.needs_vision:
            return self.latent_cache(WanLatentEncoder(self.task), self._vae_path)
        cache = self.latent_cache(WanLatentEncoder(self.task, self._vision_shape), self._vae_path)
        if cache.model_identity:  # of both files, where they are given
            cache.model_identity = combined_identity([cache.model_identity, model_identity(self.opts.clip)])
        return cache

    # -- models --------------------------------------------------------------------------------------------------------

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.components.wan_vae_utils import load_wan_vae

        vae = load_wan_vae(self._vae_path, self.vae_dtype(runtime), runtime.device, self._disable_mmap)
        vae.cache_on_cpu = self.opts.vae_cache_cpu
        return vae

    def load_parts(self, runtime: Runtime, beside: str) -> dict[str, torch.nn.Module]:
        """The vision encoder beside the VAE, for tasks that look at its states."""
        if beside != "vae" or not self.task.needs_vision:
            return {}
        from library.strategy_wan import VISION
        from library.wan_clip_utils import load_vision

        return {VISION: load_vision(self.opts.clip, self.vae_dtype(runtime), runtime.device, self._disable_mmap)}

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[umT5]."""
        from library.wan_text_encoder_utils import load_umt5

        return [self.stored_encoder(load_umt5, self.opts.t5, runtime)]

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory; with it the second expert."""
        from library.wan_utils import load_wan

        denoiser = self.placed_denoiser(load_wan, self._denoiser_path, runtime)
        if self.has_two_experts:
            from library.wan_expert_utils import TwoExperts

            other = self.placed_denoiser(load_wan, self.opts.dit_high_noise, runtime)
            denoiser.experts = TwoExperts(denoiser, other, offload=self.opts.offload_inactive_dit)
        return denoiser

    # -- the step ------------------------------------------------------------------------------------------------------

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture is a clip of one frame."""
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def timestep_sampler(self, objective: Objective) -> TimestepSampler:
        law = super().timestep_sampler(objective)
        if not self.has_two_experts:
            return law
        from library.wan_train_utils import OneSide

        times = self.config[TimestepOptions]
        if times.num_timestep_buckets is None:
            return OneSide(law, self.boundary)
        plain = build(dataclasses.replace(times, num_timestep_buckets=None))  # what replaces a draw is in no bucket
        return OneSide(law, self.boundary, plain)

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.training.run import DiTOutput
        from library.wan_conditioning_utils import training_condition, vision_tokens
        from library.wan_train_utils import predict_velocity

        velocity = yield from predict_velocity.course(
            models.denoiser, sample.noisy_latents, sample.timesteps, conditioning["t5"],
            y=training_condition(batch.conditions, fun_control=self.task.fun_control),
            vision=vision_tokens(batch.conditions), f_indices=batch.conditions.get("f_indices"),
            boundary=self.boundary if self.has_two_experts else None, known_times=sample.known_times, **inputs,
        )  # fmt: skip
        velocity, extra = self.with_side_outputs(velocity)
        return DiTOutput(velocity, sample.target, extra)

    # -- samples -------------------------------------------------------------------------------------------------------

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        """Guidance and shift of the task where the prompt leaves them open, and its negative prompt. ConfigError when
        the task needs a picture or a clip that the prompt does not name."""
        from library.generation.wan_pipeline import condition_problem

        complete = super().sample_defaults(prompt)
        problem = condition_problem(
            self.task, image=complete.image_path, control=complete.control_video_path, one_frame=complete.one_frame,
            controls=complete.control_image_path or (),
        )  # fmt: skip
        if problem:
            raise ConfigError(f"the sample prompt '{prompt.prompt}': {problem}")
        given = complete.guidance_scale if complete.cfg_scale is None else complete.cfg_scale
        low, high = (given, given) if given is not None else (self.task.guidance[0], self.task.guidance[-1])
        shift = complete.discrete_flow_shift or self.task.flow_shift(complete.width, complete.height)
        negative = self.task.negative_prompt if complete.negative_prompt is None else complete.negative_prompt
        return dataclasses.replace(
            complete, cfg_scale=low, cfg_scale_high_noise=high, discrete_flow_shift=shift, negative_prompt=negative
        )

    def needs_negative(self, prompt: SamplePrompt) -> bool:
        return any(scale not in (None, 1.0) for scale in (prompt.cfg_scale, prompt.cfg_scale_high_noise))

    def pipeline(self, models: Models) -> PicturePipeline:
        from library.generation.wan_pipeline import WanPipeline
        from library.strategy_wan import VISION

        return WanPipeline(
            models.denoiser, models.vae, task=self.task, vision=models.extra.get(VISION),
            boundary=self.boundary if self.has_two_experts else None,
        )  # fmt: skip

    # -- files ---------------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Plain]:
        two = {"ss_timestep_boundary": self.boundary} if self.has_two_experts else {}
        return {"ss_base_model_version": "wan", "ss_wan_task": self.task.name, **self.timestep_metadata(), **two}

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        version = "Wan2.2" if self.task.is_22 else "Wan2.1"
        return {"architecture": "wan2.1", "implementation": f"https://github.com/Wan-Video/{version}"}
