"""Lumina-Image 2.0: options and wiring. Numerics are in lumina_train_utils, loading in lumina_utils, text in
strategy_lumina."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import Problems
from library.core.options import LARGEST_BATCH, LARGEST_TOKENS, option, refused_option
from library.dataset import DatasetOptions
from library.dataset.text_padding import PaddedText
from library.families.lumina import FAMILY
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.flow import FlowFamily, ignored_by_flow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.families.latents import SideLimit
    from library.lumina_utils import LuminaInfo
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models

PREDICTION_TYPES = ("raw", "additive", "sigma_scaled")
TOKEN_LENGTH = 256

_SD_MODELS = "it belongs to Stable Diffusion; Lumina-Image 2.0 has no such variant"


@dataclass(frozen=True, kw_only=True)
class LuminaOptions:
    """Lumina-Image 2.0"""

    gemma2: str | None = option(
        None, help="file or folder of the Gemma-2-2B text encoder; not needed where the model's file holds it"
    )
    ae: str | None = option(
        None, help="file of the autoencoder (ae.safetensors); not needed where the model's file holds it"
    )
    gemma2_tokenizer: str | None = option(None, help="folder of the Gemma 2 tokenizer, or its tokenizer.model file")
    gemma2_max_token_length: int | None = option(
        None, help=f"longest caption in Gemma tokens, the system prompt included; {TOKEN_LENGTH} when not given",
        most=LARGEST_TOKENS,
    )
    system_prompt: str = option(
        "",
        help="text that stands before every caption, with <Prompt Start> between them; without it there is no marker",
    )
    sample_batch_size: int | None = option(
        None, help="sample images with equal settings that are made at once; as --train_batch_size when not given",
        most=LARGEST_BATCH,
    )
    model_prediction_type: str = option(
        "raw", choices=PREDICTION_TYPES,
        help="raw: compare velocities; sigma_scaled: compare the clean estimate, weighted by --weighting_scheme",
    )
    use_flash_attn: bool = option(False, help="another name of --attn_mode flash")
    use_sage_attn: bool = refused_option(
        False, help="attention of SageAttention",
        reason="SageAttention has no backward pass; the nearest that works is --attn_mode torch_flash",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.model_prediction_type == "additive":
            problems.add(
                "--model_prediction_type is additive, which compares a sum of velocity and noisy latents with a"
                " velocity; use raw (the same model output, compared with what it stands for)"
            )
        for name, usual in (("gemma2_max_token_length", TOKEN_LENGTH), ("sample_batch_size", 4)):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.add(f"--{name} is {value}; needed: 1 or more, e.g. {usual}")
        problems.raise_if_any()


class LuminaFamily(FlowFamily):
    """The wiring of Lumina-Image 2.0."""

    record = FAMILY
    denoiser_kinds = ("lumina2",)
    denoiser_writer = "library.lumina_utils:save_lumina"
    options = LuminaOptions
    attention_switches = {"use_flash_attn": "flash", **FlowFamily.attention_switches}
    defaults = {"timestep_sampling": "shift", "discrete_flow_shift": 6.0}
    part_options = {
        "vae": frozenset({"ae"}),
        "text_encoders": frozenset({"gemma2", "gemma2_tokenizer", "gemma2_max_token_length", "system_prompt"}),
    }
    refused = {"weighted_captions": "Lumina-Image 2.0 has no way to weigh words"}
    ignored = {
        **ignored_by_flow("Lumina-Image 2.0"),
        "v2": _SD_MODELS,
        "v_parameterization": "Lumina-Image 2.0 predicts the velocity of its flow in any case",
        "clip_skip": "Lumina-Image 2.0 takes the last layer but one of its text encoder",
        "max_token_length": "it counts CLIP tokens; see --gemma2_max_token_length",
        "vae": "the autoencoder of Lumina-Image 2.0 is given with --ae",
    }

    def _slot_problems(self, part: str) -> list[str]:
        """A part that is missing, something else, or not in the file that holds several parts."""
        from library.lumina_utils import part_problem

        if part == "vae":
            found = part_problem(self.opts.ae, "ae", "vae_flux", self._denoiser_path)
        else:
            found = part_problem(self.opts.gemma2, "gemma2", "gemma2", self._denoiser_path)
        return [found] if found else []

    def _tokenizer_problems(self) -> list[str]:
        """A tokenizer that cannot be found or read, or whose ids the text encoder does not have."""
        from library.components.gemma_encoder_utils import inspect_gemma2

        path = self._gemma2_path
        return tokenizer_problems(
            lambda: self._gemma2_tokenizer, lambda: inspect_gemma2(path)["vocab_size"], "Gemma 2", "--gemma2_tokenizer",
            f"--gemma2 {path}",
        )

    @cached_property
    def _gemma2_tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.gemma_tokenizer import load_gemma2_tokenizer

        cache_dir = self.config[ModelOptions].tokenizer_cache_dir
        return load_gemma2_tokenizer(self.opts.gemma2_tokenizer, cache_dir, self._gemma2_path)

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.custom_offloading_utils import row_swap_problem
        from library.lumina_utils import fitting_problems

        params = self._denoiser_info.params
        swap = row_swap_problem(self.blocks_to_swap, params.n_layers)
        found = fitting_problems(
            params, self._denoiser_path, gemma2=("gemma2", self._gemma2_path), ae=("ae", self._ae_path),
            tokens=self.max_token_length,
        )  # fmt: skip
        return [*found, swap] if swap else found

    def _notices(self) -> list[str]:
        """Lines for the log where numbers differ from what people know."""
        lines = ["the time reaches the network in float32 (known trainers round it to the type of the weights)"]
        if self.opts.model_prediction_type == "sigma_scaled":
            lines.append(
                "--model_prediction_type sigma_scaled compares the clean estimate with the clean latents (known"
                " trainers compare it with the velocity, and with the sign of other models): with --weighting_scheme"
                " sigma_sqrt this is the raw loss"
            )
        return lines

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def _gemma2_path(self) -> str | None:
        """The model's own file where it holds the text encoder and no other is given."""
        return self.opts.gemma2 or self._denoiser_path

    @property
    def _ae_path(self) -> str | None:
        return self.opts.ae or self._denoiser_path

    @property
    def num_blocks(self) -> int:
        return self._denoiser_info.params.n_layers

    @cached_property
    def _denoiser_info(self) -> LuminaInfo:
        from library.lumina_utils import inspect_lumina

        return inspect_lumina(self._denoiser_path)

    @property
    def max_token_length(self) -> int:
        """Gemma tokens of a caption with its system prompt."""
        return self.opts.gemma2_max_token_length or TOKEN_LENGTH

    @property
    def sample_batch_size(self) -> int:
        return self.opts.sample_batch_size or self.config[DatasetOptions].train_batch_size

    @property
    def padded_texts(self) -> Sequence[PaddedText]:
        return (PaddedText("attention_mask", ("hidden_state", "input_ids")),)

    def side_limit(self) -> SideLimit | None:
        if self._denoiser_path is None:
            return None  # told by the check
        return self.architecture.latents.side_limit(self._denoiser_info.params.most_patches)

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_lumina
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        system_prompt = self.opts.system_prompt
        text = self.text_cache(
            trained, [self._gemma2_path], [f"system prompt {system_prompt}"] if system_prompt else [],
            {"system_prompt": system_prompt or "", "gemma2_max_token_length": self.max_token_length},
            max_token_length=self.max_token_length,
        )
        tokenize = strategy_lumina.LuminaTokenizeStrategy(
            system_prompt, self.max_token_length, gemma2_tokenizer=self._gemma2_tokenizer
        )
        encoding = strategy_lumina.LuminaTextEncodingStrategy()
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS["lumina"])

    def latents_caching(self) -> LatentCache:
        from library.strategy_lumina import LuminaLatentEncoder

        return self.latent_cache(LuminaLatentEncoder(), self._ae_path)

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.lumina_utils import load_ae

        return load_ae(self._ae_path, runtime.vae_dtype, runtime.device, self._disable_mmap)

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[Gemma 2]."""
        from library.components.gemma_encoder_utils import load_gemma2

        return [self.stored_encoder(load_gemma2, self._gemma2_path, runtime)]

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        from library.lumina_utils import load_lumina

        denoiser = load_lumina(
            self._denoiser_path, runtime.denoiser_dtype, self.loading_place(runtime), self._disable_mmap,
            transform=self.transform, form=runtime.denoiser_form,
        )  # fmt: skip
        return self.placed(denoiser, runtime)

    def objective(self) -> Objective:
        """Velocity towards data; with sigma_scaled the clean latents, weighted by `--weighting_scheme`."""
        from library.training.objective import FlowMatchingObjective

        is_scaled = self.opts.model_prediction_type == "sigma_scaled"
        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions],
            target="latents" if is_scaled else "reverse_velocity", weigh=is_scaled,
        )  # fmt: skip

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.lumina_train_utils import predict_velocity
        from library.training.objective import clean_estimate
        from library.training.run import DiTOutput

        given = (models.denoiser, sample.noisy_latents, sample.timesteps, conditioning)
        prediction = yield from predict_velocity.course(*given, **inputs)
        prediction, extra = self.with_side_outputs(prediction)
        if self.opts.model_prediction_type == "sigma_scaled":
            prediction = clean_estimate(-prediction.float(), sample.noisy_latents, sample.sigmas)
        return DiTOutput(prediction, sample.target, extra)

    def metadata(self) -> dict[str, Plain]:
        times = self.config[TimestepOptions]
        return {
            "ss_base_model_version": "lumina2",
            "ss_weighting_scheme": times.weighting_scheme,
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_timestep_sampling": times.timestep_sampling,
            "ss_sigmoid_scale": times.sigmoid_scale,
            "ss_model_prediction_type": self.opts.model_prediction_type,
            "ss_discrete_flow_shift": times.discrete_flow_shift,
            "ss_system_prompt": self.opts.system_prompt,
        }

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {"architecture": "lumina-2", "implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0"}
