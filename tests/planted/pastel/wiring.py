"""Options and wiring; nothing heavy at module level."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.options import option
from library.dataset import CachingOptions
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import FlowFamily, ignored_by_flow
from pastel.record import FAMILY


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
        from library.checkpoints.identity import model_identity
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from pastel.models import LENGTH
        from pastel.strategies import PastelEncoding, PastelText, PastelTokenize

        caching, text = self.config[CachingOptions], None
        if caching.caches_text:
            text = PastelText(caching.cache_text_encoder_outputs_to_disk, caching.text_encoder_batch_size, caching.skip_cache_check)
            text.trained = trained
            text.model_identity, text.max_token_length = model_identity(self.opts.pastel_words), LENGTH
        return StrategySet(PastelTokenize(), PastelEncoding(), self.latents_caching(), text, TEXT_LAYOUTS["pastel"])

    def latents_caching(self):
        from library.checkpoints.identity import model_identity
        from pastel.strategies import PastelLatents

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

    @staticmethod
    def velocity(denoiser, latents, times, conditioning, **inputs):
        given = {name: tensor.to(latents.device) for name, tensor in conditioning.items()}
        return denoiser(latents.to(denoiser.dtype), times.float() / 1000, given["words"].to(denoiser.dtype), given["words_mask"], **inputs)

    def predict(self, models, sample, conditioning, batch, **inputs):
        from library.training.run import DiTOutput

        return DiTOutput(self.velocity(models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, **inputs), sample.target)

    def generate(self, models, prompt, conditioning, negative):
        import torch

        from library.generation.sampling_utils import decode_to_image, guided_velocity, start_noise
        from library.training.inference_samplers.flow import euler, flow_schedule

        spec = self.record.latents
        noise = start_noise(prompt.seed, spec.channels, prompt.height // spec.spatial_stride, prompt.width // spec.spatial_stride)

        def predict(latents, times, given):
            return self.velocity(models.denoiser, latents, times, given)

        with torch.no_grad():
            velocity = guided_velocity(predict, conditioning, negative, prompt.scale)
            latents = euler(velocity, noise.to(models.denoiser.device), flow_schedule(prompt.sample_steps))
        return decode_to_image(models.vae, latents)

    def metadata(self):
        return {"ss_base_model_version": "pastel"}

    def modelspec(self):
        return {"architecture": "pastel-1", "implementation": "pastel", "prediction_type": None}
