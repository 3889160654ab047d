"""The toy family with files for its VAE and its text encoder, as families of videos have them: both may be lacking where the
caches are complete."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from library.core.options import option
from library.families.record import OtherScript
from library.dataset.strategies import StrategySet
from library.training.wiring.video import VideoFamily
from library.training.wiring.video_options import VideoOptions
from tests.toy_video.family import ToyVideoFamily
from tests.toy_video.record import FAMILY


@dataclass(frozen=True, kw_only=True)
class CachedToyOptions(VideoOptions):
    """Toy video"""

    toy_text: str | None = option(None, help="file of the text encoder")


class CachedToyFamily(ToyVideoFamily, VideoFamily):
    record = dataclasses.replace(
        FAMILY, family="tests.toy_video.cached:CachedToyFamily",
        scripts={"full": OtherScript(name="toy_video_train", options=frozenset({"trainable_modules"}))},
    )
    options = CachedToyOptions
    denoiser_kinds = ("toy",)
    check = VideoFamily.check
    objective = VideoFamily.objective
    loaded: list[str] = []
    """parts that were loaded"""

    def _file_problems(self) -> list[str]:
        """There are no files: the models are drawn from seeds."""
        return [] if self._denoiser_path else [f"--{self.denoiser_option} is not given"]

    def part_files(self, part):
        return {"vae": self._vae_path} if part == "vae" else {"toy_text": self.opts.toy_text}

    def _slot_problems(self, part):
        return []

    _tokenizer_problems = _size_problems = lambda self: []

    def strategies(self, trained=()):
        made = super().strategies(trained)
        if not self.lacks("text_encoders"):
            return made
        return StrategySet(None, None, made.latents_caching, made.text_encoder_outputs_caching, made.text_layout)

    def save_model(self, models, path, dtype, metadata, parts=()):
        from library.safetensors_utils import save_file_atomic

        save_file_atomic({name: tensor.to(dtype) for name, tensor in models.denoiser.state_dict().items()}, path, metadata)

    def load_vae(self, runtime):
        self.loaded.append("vae")
        return super().load_vae(runtime).to(self.vae_dtype(runtime))

    def load_text_encoders(self, runtime):
        self.loaded.append("text_encoders")
        return super().load_text_encoders(runtime)


RECORD = CachedToyFamily.record
