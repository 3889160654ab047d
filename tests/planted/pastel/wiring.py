"""Options and wiring; nothing heavy at module level."""

from __future__ import annotations

from dataclasses import dataclass

from pastel.record import FAMILY

from library.core.options import option
from library.dataset import CachingOptions
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import FlowFamily, ignored_by_flow


@dataclass(frozen=True, kw_only=True)
class PastelOptions:
    """Pastel"""

    pastel_words: str | None = option(None, help="file of the text encoder")


class PastelFamily(FlowFamily):
    record = FAMILY
    options = PastelOptions
    timestep_modes = ("sigma", "uniform", "shift")
    denoiser_kinds = ("pastel",)
    part_options = {"vae": frozenset(), "text_encoders": frozenset({"pastel_words"})}
    ignored = ignored_by_flow("Pastel")
    refused = {"weighted_captions": "Pastel has no way to weigh words"}

    @property
    def _denoiser_path(self):
        return self.config[ModelOptions].pretrained_model_name_or_path

    def part_problems(self, part):
        return self._slot_problems(part)

    def _slot_problems(self, part):
        from library.checkpoints.kinds import check_slot

        slot, path, kind = {
            "vae": ("vae", self.config[ModelOptions].vae, "vae_pastel"),
            "text_encoders": ("pastel_words", self.opts.pastel_words, "pastel_words"),
        }[part]
        found = check_slot(path, slot, {kind})
        return [found] if found else []

    def _tokenizer_problems(self):
        return []

    def _size_problems(self):
        return []

    def _notices(self):
        return []

    def strategies(self, trained=()):
        from pastel.models import LENGTH
        from pastel.strategies import PastelEncoding, PastelText, PastelTokenize

        from library.checkpoints.identity import model_identity
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        caching, text = self.config[CachingOptions], None
        if caching.caches_text:
            text = PastelText(
                caching.cache_text_encoder_outputs_to_disk, caching.text_encoder_batch_size, caching.skip_cache_check
            )
            text.trained = trained
            text.model_identity, text.max_token_length = model_identity(self.opts.pastel_words), LENGTH
        return StrategySet(PastelTokenize(), PastelEncoding(), self.latents_caching(), text, TEXT_LAYOUTS["pastel"])

    def latents_caching(self):
        from pastel.strategies import PastelLatents

        from library.checkpoints.identity import model_identity

        caching = self.config[CachingOptions]
        strategy = PastelLatents(caching.cache_latents_to_disk, caching.vae_batch_size, caching.skip_cache_check)
        strategy.model_identity = model_identity(self.config[ModelOptions].vae)
        return strategy

    def load_vae(self, runtime):
        from pastel.files import load
        from pastel.models import PastelVae

        return load(PastelVae, self.config[ModelOptions].vae, runtime.vae_dtype, runtime.device)

    def load_text_encoders(self, runtime):
        from pastel.files import load
        from pastel.models import PastelWords

        return [load(PastelWords, self.opts.pastel_words, runtime.weight_dtype, runtime.device, self.transform)]

    def load_denoiser(self, runtime):
        from pastel.files import load
        from pastel.models import PastelDenoiser

        return load(PastelDenoiser, self._denoiser_path, runtime.denoiser_dtype, runtime.device, self.transform)

    def objective(self):
        from library.training.objective import FlowMatchingObjective

        return FlowMatchingObjective(self.config[TimestepOptions], self.config[NoiseOptions])

    def predict(self, models, sample, conditioning, batch, **inputs):
        from pastel.pipeline import predict_velocity

        from library.training.run import DiTOutput

        return DiTOutput(
            predict_velocity(models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, **inputs),
            sample.target,
        )

    def metadata(self):
        return {"ss_base_model_version": "pastel"}

    def modelspec(self):
        return {"architecture": "pastel-1", "implementation": "pastel", "prediction_type": None}
