"""Its wiring and strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from library.dataset import CachingOptions
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)
from library.training.option_groups import NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import ModelFamily
from networks.kinds.targets import NetworkTargets
from tests.toy_video.models import MAX_LENGTH, VOCABULARY, ToyTextEncoder, ToyVideoDit, ToyVideoVae, seeded
from tests.toy_video.record import FAMILY

FIRST_FRAME = "first_frame"
TARGETS = NetworkTargets(family="toy_video", classes=("ToyVideoBlock",))


@dataclass(frozen=True, kw_only=True)
class ToyVideoOptions:
    """Toy video"""


class ToyTokenize(TokenizeStrategy):
    """One id per word, 0 as padding."""

    def tokenize(self, text):
        texts = [text] if isinstance(text, str) else text
        ids = torch.zeros((len(texts), MAX_LENGTH), dtype=torch.int64)
        for row, words in zip(ids, (t.split() for t in texts)):
            values = [1 + sum(word.encode()) % (VOCABULARY - 1) for word in words][:MAX_LENGTH]
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        return [ids]


class ToyTextEncoding(TextEncodingStrategy):
    def encode_tokens(self, tokenize_strategy, models, tokens):
        return [None if models[0] is None else models[0](tokens[0])]


class ToyLatentsCaching(LatentsCachingStrategy):
    """Latents of pictures and clips; beside them, as a condition, those of the first frame."""

    architecture = FAMILY.architecture

    def encode(self, vae, images, seeds):
        if images.ndim == 4:
            return vae.encode(images[:, :, None], seeds)[:, :, 0]
        return vae.encode(images, seeds)

    def condition_shapes(self, bucket: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {FIRST_FRAME: self.architecture.latents.latent_shape(bucket[:2])}

    def encode_conditions(self, vae, parts, images, seeds, pictures):
        first = images if images.ndim == 4 else images[:, :, 0]
        return {FIRST_FRAME: self.encode(parts["first_frame_vae"], first, seeds)}


class ToyTextCaching(TextEncoderOutputsCachingStrategy):
    architecture = FAMILY.architecture


class ToyVideoFamily(ModelFamily):
    record = FAMILY
    options = ToyVideoOptions

    def check(self) -> None: ...

    def part_problems(self, part: str) -> list[str]:
        return []

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        caching, text = self.config[CachingOptions], None
        if caching.caches_text:
            text = ToyTextCaching(
                caching.cache_text_encoder_outputs_to_disk, caching.text_encoder_batch_size, caching.skip_cache_check
            )
            text.max_token_length = MAX_LENGTH
        return StrategySet(ToyTokenize(), ToyTextEncoding(), self.latents_caching(), text, TEXT_LAYOUTS[self.name])

    def latents_caching(self) -> LatentsCachingStrategy:
        caching = self.config[CachingOptions]
        return ToyLatentsCaching(caching.cache_latents_to_disk, caching.vae_batch_size, caching.skip_cache_check)

    def load_vae(self, runtime) -> torch.nn.Module:
        return seeded(ToyVideoVae(), 1).to(runtime.device, runtime.vae_dtype)

    def load_text_encoders(self, runtime) -> list[torch.nn.Module | None]:
        return [seeded(ToyTextEncoder(), 2).to(runtime.device)]

    def load_denoiser(self, runtime) -> torch.nn.Module:
        return seeded(ToyVideoDit(), 3).to(runtime.device, runtime.denoiser_dtype)

    def load_parts(self, runtime, beside: str) -> dict[str, torch.nn.Module]:
        """A second encoder of pictures stands for what a vision encoder would be."""
        return (
            {"first_frame_vae": seeded(ToyVideoVae(), 4).to(runtime.device, runtime.vae_dtype)}
            if beside == "vae"
            else {}
        )

    def objective(self):
        from library.training.objective import FlowMatchingObjective

        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target="velocity", weigh=True
        )

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture is a clip of one frame."""
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def predict(self, models, sample, conditioning, batch, **inputs: object):
        from library.training.run import DiTOutput

        first = batch.conditions[FIRST_FRAME].to(sample.noisy_latents)
        times = sample.timesteps / 1000
        return DiTOutput(
            models.denoiser(sample.noisy_latents, first, times, conditioning["states"], **inputs), sample.target
        )

    def metadata(self) -> dict[str, object]:
        return {"ss_base_model_version": "toy_video"}

    def modelspec(self) -> dict[str, str | None]:
        return {"architecture": "toy-video", "implementation": "here"}
