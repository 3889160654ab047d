"""What makes pictures: a family's pipeline, which samples while training and image scripts share, and what a script
adds to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from library.core.errors import AtelierError
from library.device_utils import clean_memory_on_device
from library.families.latents import Bucket, LatentSpec
from library.families.registry import record_of
from library.generation.requests import SAMPLE_NAMES, VIDEO_SAMPLE_NAMES, PictureRequest, Request, request_of
from library.generation.sampling_utils import Conditioning, decode_to_frames, one_batch
from library.generation.text_weighting import on_states, plain_text, token_weights
from library.generation.words import PromptWords

if TYPE_CHECKING:
    from PIL import Image

    from library.components.control_models import Control
    from library.dataset.strategies import StrategySet
    from library.generation.adapters import LoadedAdapters
    from library.generation.picture_files import Picture
    from library.training.inference_samplers.flow import Observe
    from library.training.sampling_prompts import SamplePrompt


@dataclass
class PicturePipeline(ABC, Generic[Request]):
    """The models of a family put together for making pictures and clips: schedule, model calls, decoding. Texts come
    encoded.

    A subclass adds the settings that are the model's, not the picture's (how it predicts, say) as fields.
    """

    denoiser: Any
    vae: Any
    """None where latents are wanted alone"""
    control: Control | None = field(default=None, kw_only=True)
    """nets that guide every forward of the denoiser by pictures, in families that have some"""
    observe: Observe | None = field(default=None, kw_only=True)
    """sees the clean latents as far as they can be told in each step"""
    further: Mapping[str, Conditioning] = field(default_factory=dict, kw_only=True)
    """texts of the request at hand beside the prompt and the negative one (`PictureRequest.further_texts`)"""

    family: ClassVar[str]
    """whose record tells the shape of the latents"""
    request_class: ClassVar[type[PictureRequest]]

    @abstractmethod
    def latents(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        """Clean latents [1, C, ...] as the denoiser has them; `request` is complete (steps, seed and sizes are set).
        `negative`: of the text that guidance leads away from, None = one forward per step."""

    @property
    def latent_spec(self) -> LatentSpec:
        return record_of(self.family).latents

    def latent_shape(self, request: PictureRequest) -> tuple[int, ...]:
        """Of the latents of a request, without the batch."""
        return self.latent_spec.latent_shape(Bucket(request.width, request.height, request.frames))

    def frames(self, latents: Tensor) -> list[Image.Image]:
        """What is decoded from latents; a picture is one frame."""
        return decode_to_frames(self.vae, latents)

    def decode(self, latents: Tensor) -> Picture:
        """The picture of latents, or the frames of a clip."""
        made = self.frames(latents)
        return made if len(made) > 1 else made[0]

    def latents_together(
        self, requests: Sequence[Request], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        """The same [B, C, ...] of several requests that differ in texts and seeds alone, as one batch; conditioning of
        all [B, ...]. Pipelines that cannot do so make them one by one."""

        def row(given: Conditioning | None, number: int) -> Conditioning | None:
            return None if given is None else {name: tensor[number : number + 1] for name, tensor in given.items()}

        made = [self.latents(one, row(conditioning, n), row(negative, n)) for n, one in enumerate(requests)]
        return torch.cat(made)

    @torch.no_grad()
    def sample(self, prompt: SamplePrompt, conditioning: Conditioning, negative: Conditioning | None) -> Picture:
        """The picture, or the frames, of a complete sample prompt."""
        return self.samples([prompt], conditioning, negative)[0]

    @torch.no_grad()
    def samples(
        self, prompts: Sequence[SamplePrompt], conditioning: Conditioning, negative: Conditioning | None
    ) -> list[Picture]:
        """Those of complete prompts that differ in texts and seeds alone; conditioning [B, ...]."""
        names = VIDEO_SAMPLE_NAMES if self.latent_spec.clips else SAMPLE_NAMES
        requests = [request_of(self.request_class, prompt, names) for prompt in prompts]
        if len(requests) == 1:
            latents = self.latents(requests[0], conditioning, negative)
        else:
            latents = self.latents_together(requests, conditioning, negative)
        return [self.decode(latents[number : number + 1]) for number in range(len(requests))]


@dataclass
class PictureMaker(Generic[Request]):
    """A pipeline with its text encoders and adapters, for requests with plain texts. Parts that wait are on the CPU
    while they do not compute."""

    pipeline: PicturePipeline[Request]
    strategies: StrategySet
    text_encoders: Sequence[nn.Module]
    adapters: LoadedAdapters
    device: torch.device
    text_device: torch.device
    text_waits: bool = False
    denoiser_waits: bool = False
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext
    """what the denoiser's forwards run inside"""
    weighs_words: bool = False
    """whether marks in texts weigh words (`text_weighting.py`)"""

    @cached_property
    def words(self) -> PromptWords:
        """Words of embedding files."""
        keys = record_of(self.pipeline.family).embedding_keys
        return PromptWords(self.strategies.tokenize.tokenizers, self.text_encoders, keys)

    @torch.no_grad()
    def generate(self, request: Request) -> Tensor:
        """Latents of one picture; `request` is complete. AtelierError where they are not finite, which would decode to
        black."""
        self.adapters.set_multipliers(request.multipliers)
        conditioning, negative = self.conditioning(request)
        self.pipeline.further = self.further(request)
        with self._at_work([self.pipeline.denoiser], self.device, self.denoiser_waits), self.computing():
            latents = self.pipeline.latents(request, conditioning, negative)
        if not bool(torch.isfinite(latents).all()):
            raise AtelierError(
                "the latents have values that are not finite: the model overflows in its number format (bfloat16 and"
                " float32 have room), or a scale or the weight of a word is too large"
            )
        return latents

    @torch.no_grad()
    def conditioning(self, request: Request) -> tuple[Conditioning, Conditioning | None]:
        """That of the prompt, and of the text that guidance leads away from where there is one."""
        with self._at_work(self.text_encoders, self.text_device, self.text_waits):
            rows = [self._encoded(texts, self.strategies.tokenize.tokenize) for texts in request.rows]
            conditioning = one_batch(rows)
            text = request.negative_text
            return conditioning, (
                None if text is None else self._encoded((text,), self.strategies.tokenize.tokenize_negative)
            )

    @torch.no_grad()
    def further(self, request: Request) -> dict[str, Conditioning]:
        """That of `further_texts`."""
        texts = request.further_texts
        if not texts:
            return {}
        with self._at_work(self.text_encoders, self.text_device, self.text_waits):
            tokenize = self.strategies.tokenize.tokenize_negative
            return {name: self._encoded((text,), tokenize) for name, text in texts.items()}

    def decode(self, latents: Tensor) -> Picture:
        return self.pipeline.decode(latents)

    def _encoded(self, texts: Sequence[str], tokenize: Callable[[str], list[Tensor]]) -> Conditioning:
        if self.weighs_words:
            return self._weighted(texts, tokenize)
        tokens = [tokenize(self.words.text(text)) for text in texts]
        # where each tokenizer has a text of its own, each one's tokens are those of its text
        own = tokens[0] if len(tokens) == 1 else [made[place] for place, made in enumerate(tokens)]
        return self.strategies.encode(self.text_encoders, own)

    def _weighted(self, texts: Sequence[str], tokenize: Callable[[str], list[Tensor]]) -> Conditioning:
        """As `_encoded`, with the weights that the texts give their words."""
        plain = [plain_text(text) for text in texts]
        ids = [tokenize(self.words.text(text)) for text in plain]
        own = ids[0] if len(ids) == 1 else [made[place] for place, made in enumerate(ids)]
        found = self.strategies.encode(self.text_encoders, own)
        if plain == list(texts):
            return found
        empty = self.strategies.encode(self.text_encoders, tokenize(""))
        for key, place in record_of(self.pipeline.family).weighted_texts.items():
            tokenizer = self.strategies.tokenize.reading_tokenizers[place]
            if tokenizer is not None:
                text = self.words.text(texts[min(place, len(texts) - 1)])
                weights = token_weights(tokenizer, text, own[place].flatten().tolist())
                found[key] = on_states(found[key], empty[key], weights)
        return found

    @contextmanager
    def _at_work(self, parts: Sequence[nn.Module], device: torch.device, waits: bool) -> Iterator[None]:
        if waits:
            for part in parts:
                part.to(device)
        self.adapters.follow_models()
        try:
            yield
        finally:
            if waits and device.type != "cpu":
                for part in parts:
                    part.to("cpu")
                clean_memory_on_device(device)
