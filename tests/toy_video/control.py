"""The toy family with control pictures: their latents are a condition beside those of the first frame."""

from __future__ import annotations

import dataclasses

from library.config_util import ScriptRules
from library.dataset import CachingOptions
from library.dataset.batch import CONDITIONING_IMAGES
from library.training.trainables.network import NetworkTrainable
from tests.toy_video.family import FIRST_FRAME, ToyLatentsCaching, ToyVideoFamily
from tests.toy_video.record import FAMILY

CONTROL = "control"


class ControlCaching(ToyLatentsCaching):
    condition_pictures = (CONDITIONING_IMAGES,)

    def condition_shapes(self, bucket):
        return {**super().condition_shapes(bucket), CONTROL: self.architecture.latents.latent_shape(bucket[:2])}

    def encode_conditions(self, vae, parts, images, seeds, pictures):
        made = super().encode_conditions(vae, parts, images, seeds, pictures)
        return {**made, CONTROL: self.encode(vae, pictures[CONDITIONING_IMAGES], seeds)}


class ControlFamily(ToyVideoFamily):
    def latents_caching(self):
        caching = self.config[CachingOptions]
        return ControlCaching(caching.cache_latents_to_disk, caching.vae_batch_size, caching.skip_cache_check)

    def predict(self, models, sample, conditioning, batch, **inputs):
        assert CONDITIONING_IMAGES not in batch.conditions, "what is made of it stands in its place"
        both = batch.conditions[FIRST_FRAME] + batch.conditions[CONTROL]
        batch = dataclasses.replace(batch, conditions={FIRST_FRAME: both})
        return super().predict(models, sample, conditioning, batch, **inputs)


class ControlTrainable(NetworkTrainable):
    @classmethod
    def dataset_rules(cls, family):
        return ScriptRules(frozenset({"CN"}), masks=False)


class PlainTrainable(NetworkTrainable):
    """For data without control pictures."""


RECORD = dataclasses.replace(FAMILY, family="tests.toy_video.control:ControlFamily")
