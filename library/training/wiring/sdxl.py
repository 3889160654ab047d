"""SDXL: options and wiring. Numerics are in sdxl_train_utils, loading in sdxl_utils, text in strategy_sdxl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.learning_rates import rate
from library.core.options import option
from library.families.sdxl import FAMILY
from library.training.optimizers import OptimizerOptions
from library.training.option_groups import ModelOptions
from library.training.whole_models import WholeModelOptions
from library.training.wiring.base import part_of, tokenizer_problems
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

BLOCKS = (
    r"^(time_embed|label_emb)\.",
    *(rf"^input_blocks\.{block}\." for block in range(9)),
    *(rf"^middle_block\.{block}\." for block in range(3)),
    *(rf"^output_blocks\.{block}\." for block in range(9)),
    r"^out\.",
)
"""the blocks of the U-Net in the order of --block_lr"""


@dataclass(frozen=True, kw_only=True)
class SdxlOptions:
    """SDXL"""

    clip_tokenizer: str | None = option(
        None, help="folder of the CLIP tokenizer, for models with a vocabulary of their own"
    )


class SdxlFamily(UNetFamily):
    """The wiring of SDXL."""

    record = FAMILY
    options = SdxlOptions
    kinds = frozenset({"sdxl"})
    part_options = {"vae": frozenset(), "text_encoders": frozenset({"clip_tokenizer"})}
    refused = {
        **UNetFamily.refused, "v2": "it belongs to Stable Diffusion 2, which has its own script, train_network.py",
    }  # fmt: skip
    foreign = foreign_to_unet("SDXL")
    ignored = {"clip_skip": "SDXL takes the last but one layer of both text encoders, which is 2"}
    neutral = {"clip_skip": (2,)}

    @cached_property
    def info(self) -> UNetInfo:
        from library.sdxl_utils import inspect_sdxl_unet

        return inspect_sdxl_unet(self.base_path)

    @cached_property
    def vae_info(self) -> AutoEncoderInfo:
        from library.sdxl_utils import inspect_vae_sdxl

        return inspect_vae_sdxl(self.vae_path)

    def notices(self) -> list[str]:
        """Where numbers differ on purpose from those of known trainers, beside what all U-Nets have."""
        lines = super().notices()
        if os.path.isfile(self.base_path or ""):  # folders hold the matrix the way round in which everybody uses it
            lines.append(
                "pooled captions go through text_projection as it was trained (known trainers use the transposed "
                "matrix of single files)"
            )
        lines.append(
            "the crop in the size conditioning is the corner that was cut off the picture (known trainers tell margins "
            "on the other axis)"
        )
        return lines

    def text_problems(self) -> list[str]:
        from library.sdxl_utils import text_encoder_sizes, text_width_problem

        try:
            sizes, params = text_encoder_sizes(self.base_path), self.info.params
        except CheckpointError as error:
            return [about_slot("pretrained_model_name_or_path", self.base_path, error)]
        found = tokenizer_problems(
            lambda: self._tokenizers[0], lambda: min(v["vocab"] for v in sizes), "CLIP", "--clip_tokenizer"
        )
        width = text_width_problem(self.base_path, sizes, params)
        return [*found, width] if width else found

    @cached_property
    def _tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The same vocabulary twice; the second one pads with its first entry."""
        from library.components.tokenizers import load_clip_tokenizer
        from library.strategy_sdxl import SECOND_PAD

        given = (self.opts.clip_tokenizer, self.config[ModelOptions].tokenizer_cache_dir)
        return (
            load_clip_tokenizer(*given, option="--clip_tokenizer"),
            load_clip_tokenizer(*given, pad_token=SECOND_PAD, option="--clip_tokenizer"),
        )

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_sdxl
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        model = self.config[ModelOptions]
        parts = {part_of(self.base_path, name) for name in ("text_encoder", "text_encoder_2")}
        text = self.text_cache(
            trained, sorted(parts), is_weighted=model.weighted_captions, max_token_length=model.max_token_length or 75
        )
        tokenize = strategy_sdxl.SdxlTokenizeStrategy(
            model.max_token_length, tokenizers=self._tokenizers, is_weighted=model.weighted_captions
        )
        return StrategySet(
            tokenize, strategy_sdxl.SdxlTextEncodingStrategy(), self.latents_caching(), text, TEXT_LAYOUTS["sdxl"]
        )

    def embedding_widths(self) -> Widths:
        from library.sdxl_utils import embedding_widths

        return embedding_widths(self.base_path)

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[CLIP-L, CLIP bigG]."""
        from torch import nn

        from library.sdxl_utils import load_text_encoders_sdxl

        def load(*settings: object, **further: object) -> nn.ModuleList:
            return nn.ModuleList(load_text_encoders_sdxl(*settings, **further))

        return list(self.stored_encoder(load, self.base_path, runtime))

    def layer_rates(self) -> Mapping[str, float]:
        """Those of --block_lr, block by block."""
        text = self.config[WholeModelOptions].block_lr if WholeModelOptions in self.config else None
        if not text:
            return {}
        if not self.config[OptimizerOptions].learning_rate:
            raise ConfigError("--block_lr is set with --learning_rate 0, which freezes the U-Net; give a rate above 0")
        try:
            rates = [rate(part) for part in text.split(",")]
        except ValueError as error:
            raise ConfigError(f"--block_lr is {text}; needed: {len(BLOCKS)} numbers with commas ({error})") from error
        if len(rates) != len(BLOCKS):
            raise ConfigError(f"--block_lr has {len(rates)} numbers; needed: {len(BLOCKS)}, one for each block")
        return dict(zip(BLOCKS, rates, strict=True))

    def unused_text_layers(self, number: int, encoder: torch.nn.Module) -> Sequence[str]:
        """Of the first text encoder only the last layer but one is read; the second one gives its pooled state too."""
        if number:
            return ()
        last = encoder.config.num_hidden_layers - 1
        return (f"text_model.encoder.layers.{last}.", "text_model.final_layer_norm.", "text_projection.")

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        from library.sdxl_utils import load_unet_sdxl

        return self.stored_unet(load_unet_sdxl, runtime)

    @property
    def file_kind(self) -> str:
        return FAMILY.name

    def folder_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizers[0]

    def base_denoiser(self) -> torch.nn.Module:
        from library.sdxl_utils import load_unet_sdxl

        return load_unet_sdxl(self.base_path, None, "cpu", self.disable_mmap)

    def base_text_encoders(self) -> list[torch.nn.Module]:
        from library.sdxl_utils import load_text_encoders_sdxl

        return list(load_text_encoders_sdxl(self.base_path, None, "cpu", self.disable_mmap))

    def file_tensors(
        self, denoiser: torch.nn.Module | None, text_encoders: Sequence[torch.nn.Module] | None,
        vae: torch.nn.Module | None,
    ) -> dict[str, torch.Tensor]:
        from library.sdxl_utils import checkpoint_state

        return checkpoint_state(denoiser, text_encoders, vae)

    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.sdxl_train_utils import predict_noise
        from library.training.run import DiTOutput

        sizes = (batch.original_sizes_hw, batch.crop_top_lefts, batch.target_sizes_hw)
        prediction = predict_noise(
            models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, sizes, **inputs
        )
        return DiTOutput(prediction, sample.target)

    def metadata(self) -> dict[str, Plain]:
        return {"ss_base_model_version": "sdxl_base_v1-0"}

    def modelspec(self) -> dict[str, str | None]:
        return {
            "architecture": "stable-diffusion-xl-v1-base",
            "implementation": "https://github.com/Stability-AI/generative-models",
            "prediction_type": "v" if self.is_v else "epsilon",
        }
