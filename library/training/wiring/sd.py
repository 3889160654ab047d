"""Stable Diffusion 1 and 2: options and wiring. Numerics are in sd_train_utils, loading in sd_utils, text in
strategy_sd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError
from library.core.options import option
from library.families.sd import FAMILY
from library.training.option_groups import ModelOptions
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.unet import UNetFamily, about_slot, foreign_to_unet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.embeddings import Widths
    from library.components.ldm_utils import AutoEncoderInfo
    from library.components.unet_utils import UNetInfo
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning, StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models

_NO_TEXT_CACHE = "captions of Stable Diffusion are encoded in the step; its text encoder is small"


@dataclass(frozen=True, kw_only=True)
class SdOptions:
    """Stable Diffusion 1 and 2"""

    clip_tokenizer: str | None = option(
        None, help="folder of the CLIP tokenizer, for models with a vocabulary of their own"
    )


class SdFamily(UNetFamily):
    """The wiring of Stable Diffusion 1 and 2."""

    record = FAMILY
    options = SdOptions
    kinds = frozenset({"sd1", "sd2"})
    part_options = {"vae": frozenset(), "text_encoders": frozenset({"clip_tokenizer"})}
    foreign = {
        **foreign_to_unet("Stable Diffusion"),
        "cache_text_encoder_outputs": _NO_TEXT_CACHE,
        "cache_text_encoder_outputs_to_disk": _NO_TEXT_CACHE,
        "text_encoder_batch_size": _NO_TEXT_CACHE,
    }

    @cached_property
    def info(self) -> UNetInfo:
        from library.sd_utils import inspect_sd_unet

        return inspect_sd_unet(self.base_path)

    @cached_property
    def vae_info(self) -> AutoEncoderInfo:
        from library.sd_utils import inspect_vae_sd

        return inspect_vae_sd(self.vae_path)

    def declared_problems(self, info: UNetInfo) -> list[str]:
        found = super().declared_problems(info)
        if info.is_v2 and not self.is_v2:
            found.append(f"{self.base_path} is Stable Diffusion 2; add --v2")
        if self.is_v2 and not info.is_v2:
            found.append(f"--v2 is set, {self.base_path} is Stable Diffusion 1; leave --v2 out")
        return found

    def text_problems(self) -> list[str]:
        from library.components.text_encoder_utils import inspect_clip
        from library.sd_utils import clip_skip_problem, text_slot

        try:
            rows = inspect_clip(self.base_path, text_slot(self.info.is_v2)).values[
                "vocab"
            ]  # a wrong --v2 is told of once
        except CheckpointError as error:
            return [about_slot("pretrained_model_name_or_path", self.base_path, error)]
        found = tokenizer_problems(lambda: self._tokenizer, lambda: rows, "CLIP", "--clip_tokenizer")
        skip = clip_skip_problem(self.base_path, self.info.is_v2, self.config[ModelOptions].clip_skip)
        return [*found, skip] if skip else found

    def notices(self) -> list[str]:
        lines = super().notices()
        if self.is_v2 and self.config[ModelOptions].clip_skip:
            lines.append(
                "--v2 with --clip_skip: Stable Diffusion 2 leaves out its last layer already; layers are counted from "
                "there"
            )
        return lines

    @property
    def is_v2(self) -> bool:
        return self.config[ModelOptions].v2

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_clip_tokenizer
        from library.strategy_sd import V2_PAD

        cache = self.config[ModelOptions].tokenizer_cache_dir
        return load_clip_tokenizer(
            self.opts.clip_tokenizer, cache, pad_token=V2_PAD if self.is_v2 else None, option="--clip_tokenizer"
        )

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from library.strategy_sd import SdTextEncodingStrategy, SdTokenizeStrategy

        model = self.config[ModelOptions]
        tokenize = SdTokenizeStrategy(
            self.is_v2, model.max_token_length, tokenizer=self._tokenizer, is_weighted=model.weighted_captions
        )
        return StrategySet(
            tokenize, SdTextEncodingStrategy(model.clip_skip), self.latents_caching(), None, TEXT_LAYOUTS["sd"]
        )

    def embedding_widths(self) -> Widths:
        from library.components.text_encoder_utils import inspect_clip
        from library.sd_utils import text_slot

        width = inspect_clip(self.base_path, text_slot(self.info.is_v2)).values["width"]
        return dict.fromkeys(FAMILY.embedding_keys, width)

    def text_layers(self) -> Sequence[str]:
        from library.components.unet_models import text_layers

        return text_layers(self.info.params)

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        from library.sd_utils import load_text_encoder_sd

        def load(path: str, *settings: object, **further: object) -> torch.nn.Module:
            return load_text_encoder_sd(path, self.is_v2, *settings, **further)

        return [self.stored_encoder(load, self.base_path, runtime)]

    def unused_text_layers(self, number: int, encoder: torch.nn.Module) -> Sequence[str]:
        """The projection of the pooled state, and with --clip_skip the layers behind."""
        depth, skip = encoder.config.num_hidden_layers, self.config[ModelOptions].clip_skip or 1
        last = range(depth - skip + 1, depth)
        return ("text_projection.", *(f"text_model.encoder.layers.{layer}." for layer in last))

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        from library.sd_utils import load_unet_sd

        return self.stored_unet(load_unet_sd, runtime)

    @property
    def file_kind(self) -> str:
        return "sd2" if self.is_v2 else "sd1"

    def folder_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def base_denoiser(self) -> torch.nn.Module:
        from library.sd_utils import load_unet_sd

        return load_unet_sd(self.base_path, None, "cpu", self.disable_mmap)

    def base_text_encoders(self) -> list[torch.nn.Module]:
        from library.sd_utils import load_text_encoder_sd

        return [load_text_encoder_sd(self.base_path, self.is_v2, None, "cpu", self.disable_mmap)]

    def file_tensors(
        self, denoiser: torch.nn.Module | None, text_encoders: Sequence[torch.nn.Module] | None,
        vae: torch.nn.Module | None,
    ) -> dict[str, torch.Tensor]:
        from library.sd_utils import checkpoint_state

        return checkpoint_state(denoiser, text_encoders and text_encoders[0], vae, self.is_v2)

    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.sd_train_utils import predict_noise
        from library.training.run import DiTOutput

        return DiTOutput(
            predict_noise(models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, **inputs),
            sample.target,
        )

    def metadata(self) -> dict[str, Plain]:
        return {"ss_base_model_version": f"sd_v{2 if self.is_v2 else 1}{'_v' if self.is_v else ''}"}

    def modelspec(self) -> dict[str, str | None]:
        version = ("v2-768-v" if self.is_v else "v2-512") if self.is_v2 else "v1"
        return {
            "architecture": f"stable-diffusion-{version}",
            "implementation": "diffusers",
            "prediction_type": "v" if self.is_v else "epsilon",
        }
