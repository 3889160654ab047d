"""Anima: options and wiring. Numerics are in anima_train_utils, loading in anima_utils, text in strategy_anima."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import Problems
from library.core.options import LARGEST_TOKENS, Ignored, equivalent_option, option, without_effect
from library.dataset import CachingOptions
from library.families.anima import FAMILY
from library.training.adapters import NetworkOptions
from library.training.inference_samplers import DEFAULT_SAMPLER
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.whole_models import WholeModelOptions
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.flow import FlowFamily, ignored_by_flow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.anima_models import AdapterParams
    from library.anima_utils import AnimaInfo
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.families.latents import SideLimit
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)

TOKEN_LENGTH = 512
RATE_PATTERNS = {
    "llm_adapter_lr": r"llm_adapter\..*",
    "self_attn_lr": r"blocks\.\d+\.self_attn\..*",
    "cross_attn_lr": r"blocks\.\d+\.cross_attn\..*",
    "mlp_lr": r"blocks\.\d+\.mlp\..*",
    "mod_lr": r"blocks\.\d+\.adaln_modulation.*",
}
"""options of rates -> the layers they speak of; the first that fits a layer counts"""
WHOLE_RATE_PATTERNS = {**RATE_PATTERNS, "mod_lr": r"(blocks\.\d+|final_layer)\.adaln_modulation.*"}
"""the same where the whole model learns: the last layer, which takes no adapter, has a modulation too"""
RATE_SWITCHES = {"llm_adapter_lr": "train_llm_adapter=True", "mod_lr": "include_patterns=['.*_modulation.*']"}
"""options of rates whose layers learn only with a network argument"""

_SD_MODELS = "it belongs to Stable Diffusion; Anima has no such variant"


@dataclass(frozen=True, kw_only=True)
class AnimaOptions:
    """Anima"""

    qwen3: str | None = option(None, help="file or folder of the Qwen3-0.6B text encoder")
    qwen3_tokenizer: str | None = option(None, help="folder of the Qwen3 tokenizer")
    t5_tokenizer_path: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    qwen3_max_token_length: int = option(TOKEN_LENGTH, help="longest caption in Qwen3 tokens", most=LARGEST_TOKENS)
    t5_max_token_length: int = option(
        TOKEN_LENGTH,
        help="longest caption in T5 tokens; also the length of the denoiser's context",
        most=LARGEST_TOKENS,
    )
    llm_adapter_path: str | None = option(None, help="file whose LLM adapter replaces that of the model")
    llm_adapter_lr: float | None = option(
        None,
        help="learning rate of the LLM adapter's layers, which learn with --network_args train_llm_adapter=True; 0 = not trained",
    )
    self_attn_lr: float | None = option(None, help="learning rate of the self-attention layers; 0 = not trained")
    cross_attn_lr: float | None = option(None, help="learning rate of the cross-attention layers; 0 = not trained")
    mlp_lr: float | None = option(None, help="learning rate of the feed-forward layers; 0 = not trained")
    mod_lr: float | None = option(
        None,
        help="learning rate of the modulations, which adapters train only with --network_args include_patterns; 0 = not trained",
    )
    vae_chunk_size: int | None = option(
        None, help="rows that the VAE computes at once, an even number: less memory, equal results; all when not given"
    )
    vae_disable_cache: bool = equivalent_option(
        False, help="no feature cache in the VAE",
        reason="--vae_disable_cache: a single image has no earlier frames, so there is nothing that would be kept",
    )
    unsloth_offload_checkpointing: bool = option(
        False, help="another spelling of --gradient_checkpointing --cpu_offload_checkpointing, which do the same here"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("qwen3_max_token_length", "t5_max_token_length"):
            if getattr(self, name) < 1:
                problems.add(f"--{name} is {getattr(self, name)}; needed: 1 or more, usually {TOKEN_LENGTH}")
        for name in RATE_PATTERNS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                problems.add(f"--{name} is {value}; needed: a learning rate of 0 or more")
        if self.vae_chunk_size is not None and (self.vae_chunk_size < 2 or self.vae_chunk_size % 2):
            problems.add(f"--vae_chunk_size is {self.vae_chunk_size}; needed: an even number of 2 or more, e.g. 64")
        problems.raise_if_any()


class AnimaFamily(FlowFamily):
    """The wiring of Anima."""

    record = FAMILY
    denoiser_kinds = ("anima", "cosmos")
    denoiser_writer = "library.anima_utils:save_anima"
    options = AnimaOptions
    defaults = {"timestep_sampling": "sigmoid", "discrete_flow_shift": 1.0}
    own_sampler = DEFAULT_SAMPLER
    part_options = {
        "vae": frozenset({"vae_chunk_size", "vae_disable_cache"}),
        "text_encoders": frozenset(
            {"qwen3", "qwen3_tokenizer", "t5_tokenizer_path", "qwen3_max_token_length", "t5_max_token_length"}
        ),
    }
    stands_for = {"unsloth_offload_checkpointing": {"gradient_checkpointing": True, "cpu_offload_checkpointing": True}}
    refused = {"weighted_captions": "training Anima with weighted words is not possible"}
    ignored = {
        **ignored_by_flow("Anima"),
        "v2": _SD_MODELS,
        "v_parameterization": "Anima predicts the velocity of its flow in any case",
        "clip_skip": "Anima takes the last layer of its text encoder",
        "max_token_length": "it counts CLIP tokens; see --qwen3_max_token_length and --t5_max_token_length",
    }

    def _slot_problems(self, part: str) -> list[str]:
        """Files of a part that are missing or something else."""
        from library.anima_utils import adapter_file_problem
        from library.checkpoints.kinds import check_slot

        if part == "vae":
            found = [check_slot(self._vae_path, "vae", {"vae_wan"})]
        else:
            slot = check_slot(self.opts.qwen3, "qwen3", {"qwen3"})
            found = [slot, adapter_file_problem(self.opts.llm_adapter_path)]
        return [problem for problem in found if problem]

    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the models do not have."""
        from library.components.llm_encoder_utils import inspect_qwen3

        qwen3 = self.opts.qwen3
        return [
            *tokenizer_problems(
                lambda: self._qwen3_tokenizer, lambda: inspect_qwen3(qwen3)["vocab_size"], "Qwen3", "--qwen3_tokenizer",
                f"--qwen3 {qwen3}"
            ),
            *tokenizer_problems(lambda: self._t5_tokenizer, None, "T5", "--t5_tokenizer_path"),
        ]

    @cached_property
    def _qwen3_tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_qwen3_tokenizer

        return load_qwen3_tokenizer(
            self.opts.qwen3_tokenizer, self.config[ModelOptions].tokenizer_cache_dir, self.opts.qwen3
        )

    @cached_property
    def _t5_tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_t5_tokenizer

        cache_dir = self.config[ModelOptions].tokenizer_cache_dir
        return load_t5_tokenizer(self.opts.t5_tokenizer_path, cache_dir, option="--t5_tokenizer_path")

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.anima_utils import fitting_problems
        from library.custom_offloading_utils import row_swap_problem

        params, adapter = self._denoiser_info.params, self._adapter
        place = self.opts.llm_adapter_path or self._denoiser_path
        problems: list[str | None] = [*fitting_problems(
            params, adapter, qwen3=("qwen3", self.opts.qwen3), vae=("vae", self._vae_path), model=self._denoiser_path,
            adapter_path=place
        )]
        if adapter is not None:
            rows, where = adapter.vocab, f"the LLM adapter in {place}"
            problems += tokenizer_problems(lambda: self._t5_tokenizer, lambda: rows, "T5", "--t5_tokenizer_path", where)
        problems.append(row_swap_problem(self.blocks_to_swap, params.num_blocks))
        return [problem for problem in problems if problem]

    @cached_property
    def _adapter(self) -> AdapterParams | None:
        """Sizes of the LLM adapter that the run uses."""
        from library.anima_utils import inspect_llm_adapter

        if not self.opts.llm_adapter_path:
            return self._denoiser_info.params.adapter
        return inspect_llm_adapter(self.opts.llm_adapter_path)[2]

    def _notices(self) -> list[str]:
        """Lines for the log where a setting has no effect or numbers differ from what people know."""
        lines = ["the time reaches the network in float32 (known trainers round it to the type of the weights)"]
        if self._adapter is None:
            lines.append("the model file has no LLM adapter: the denoiser attends to the states of Qwen3 directly")
        if self.config[CachingOptions].caches_text and "caption_dropout_rate" not in self.config.explicit:
            lines.append(
                "caption dropout follows the dataset, also with cached text encoder outputs; rates in old cache files "
                "are not read"
            )
        return lines

    def idle(self) -> list[Ignored]:
        reason = 'these layers learn only with --network_args "{}"'
        return [
            item
            for name, switch in self._idle_rates().items()
            for item in without_effect([name], reason.format(switch))
        ]

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def _vae_path(self) -> str | None:
        return self.config[ModelOptions].vae

    @property
    def num_blocks(self) -> int:
        return self._denoiser_info.params.num_blocks

    @cached_property
    def _denoiser_info(self) -> AnimaInfo:
        from library.anima_utils import inspect_anima

        return inspect_anima(self._denoiser_path)

    def layer_rates(self) -> Mapping[str, float]:
        """Path pattern -> learning rate, from the options of rates that are given and mean layers that learn."""
        patterns = WHOLE_RATE_PATTERNS if WholeModelOptions in self.config else RATE_PATTERNS
        given = {
            pattern: getattr(self.opts, name)
            for name, pattern in patterns.items()
            if name not in self._idle_rates()
        }
        return {pattern: rate for pattern, rate in given.items() if rate is not None}

    def _idle_rates(self) -> dict[str, str]:
        """Options of rates whose layers take no adapter -> the network argument that gives them one. A network that is
        made after a file has the layers of the file."""
        if NetworkOptions not in self.config or self.config[NetworkOptions].dim_from_weights:
            return {}
        given = [name for name in RATE_SWITCHES if getattr(self.opts, name) is not None]
        pairs = self.config[NetworkOptions].pairs
        return {name: RATE_SWITCHES[name] for name in given if RATE_SWITCHES[name].split("=")[0] not in pairs}

    def side_limit(self) -> SideLimit | None:
        if self._denoiser_path is None:
            return None  # told by the check
        return self.architecture.latents.side_limit(self._denoiser_info.params.most_patches)

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_anima
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        # the number of T5 tokens is part of what was encoded, and the record has one length only
        text = self.text_cache(
            trained, [self.opts.qwen3], [f"t5 tokens {self.opts.t5_max_token_length}"],
            {"t5_max_token_length": self.opts.t5_max_token_length}, max_token_length=self.opts.qwen3_max_token_length,
        )
        tokenize = strategy_anima.AnimaTokenizeStrategy(
            self.opts.qwen3_max_token_length, self.opts.t5_max_token_length,
            qwen3_tokenizer=self._qwen3_tokenizer, t5_tokenizer=self._t5_tokenizer,
        )  # fmt: skip
        return StrategySet(
            tokenize, strategy_anima.AnimaTextEncodingStrategy(), self.latents_caching(), text, TEXT_LAYOUTS["anima"]
        )

    def latents_caching(self) -> LatentCache:
        from library.strategy_anima import AnimaLatentEncoder

        return self.latent_cache(AnimaLatentEncoder(), self._vae_path)

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.components.wan_vae_utils import load_wan_vae

        vae = load_wan_vae(self._vae_path, runtime.vae_dtype, runtime.device, self._disable_mmap)
        vae.set_chunk_rows(self.opts.vae_chunk_size)
        return vae

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[Qwen3]."""
        from library.components.llm_encoder_utils import load_qwen3

        return [self.stored_encoder(load_qwen3, self.opts.qwen3, runtime)]

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        from library.anima_utils import load_anima

        denoiser = load_anima(
            self._denoiser_path, runtime.denoiser_dtype, self.loading_place(runtime), self._disable_mmap,
            llm_adapter_path=self.opts.llm_adapter_path, transform=self.transform, form=runtime.denoiser_form,
        )  # fmt: skip
        return self.placed(denoiser, runtime)

    def objective(self) -> Objective:
        """Velocity, weighted by `--weighting_scheme`."""
        from library.training.objective import FlowMatchingObjective

        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target="velocity", weigh=True
        )

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.anima_train_utils import predict_velocity
        from library.training.run import DiTOutput

        given = (models.denoiser, sample.noisy_latents, sample.timesteps, conditioning)
        velocity = yield from predict_velocity.course(*given, **inputs)
        velocity, extra = self.with_side_outputs(velocity)
        return DiTOutput(velocity, sample.target, extra)

    def needs_negative(self, prompt: SamplePrompt) -> bool:
        return prompt.scale is not None and prompt.scale > 1.0

    def metadata(self) -> dict[str, Plain]:
        times = self.config[TimestepOptions]
        return {
            "ss_base_model_version": "anima",
            "ss_weighting_scheme": times.weighting_scheme,
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_timestep_sampling": times.timestep_sampling,
            "ss_sigmoid_scale": times.sigmoid_scale,
            "ss_discrete_flow_shift": times.discrete_flow_shift,
        }

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {"architecture": "anima-preview", "implementation": "https://huggingface.co/circlestone-labs/Anima"}
