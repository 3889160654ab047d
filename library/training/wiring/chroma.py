"""Chroma: options and wiring, a variant of FLUX.1 in the scripts of that family. Numerics are in chroma_train_utils,
loading in chroma_utils, text in strategy_chroma."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import Course
from library.core.errors import ConfigError
from library.core.options import LARGEST_TOKENS, Ignored, equivalent_option, ignored_option, option
from library.dataset.text_padding import PaddedText
from library.families.chroma import FAMILY
from library.training.whole_models import WholeModelOptions
from library.training.wiring.flux import MODEL_TYPES, TOKEN_LENGTH_DEV, FluxFamily, FluxOptions, ignored_options

if TYPE_CHECKING:
    import torch

    from library.dataset.strategies import Conditioning
    from library.flux_models import StreamTransformer
    from library.flux_utils import StreamModelInfo
    from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain

TOKEN_LENGTH = TOKEN_LENGTH_DEV
T5_ALONE = "Chroma reads captions through T5 alone"
ALWAYS_MASKED = (
    "--apply_t5_attn_mask: Chroma never attends to padding, but for the one token with which it was trained"
)
APPROXIMATOR = r"distilled_guidance_layer\."
NO_GUIDANCE = "Chroma has no embedded guidance; what stands in its place is always 0"


@dataclass(frozen=True, kw_only=True)
class ChromaOptions(FluxOptions):
    """Chroma"""

    clip_l: str | None = ignored_option(None, help="file of the CLIP-L text encoder", reason=T5_ALONE)
    clip_l_tokenizer: str | None = option(None, help="folder of the CLIP-L tokenizer")
    t5xxl_max_token_length: int | None = option(
        None, help=f"longest caption in T5 tokens; {TOKEN_LENGTH} when not given", most=LARGEST_TOKENS
    )
    apply_t5_attn_mask: bool = equivalent_option(
        False, help="keep T5 and the denoiser from attending to padding", reason=ALWAYS_MASKED
    )
    guidance_scale: float = ignored_option(0.0, help="embedded guidance while training", reason=NO_GUIDANCE)
    model_type: str = option("chroma", help="chroma, or flux, whose options differ", choices=MODEL_TYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type != FAMILY.name:
            raise ConfigError(f"--model_type is {self.model_type}; needed for Chroma: {FAMILY.name}, or leave it out")


class ChromaFamily(FluxFamily):
    """The wiring of Chroma."""

    record = FAMILY
    denoiser_kinds = ("chroma",)
    denoiser_writer = "library.chroma_utils:save_chroma"
    options = ChromaOptions
    takes_token_times = False
    """its approximator makes the vectors of all blocks for one time per sample; one per token would need hundreds of
    vectors for each"""
    part_options = {
        "vae": frozenset({"ae"}),
        "text_encoders": frozenset({
            "t5xxl", "t5xxl_tokenizer", "t5xxl_max_token_length", "apply_t5_attn_mask", "clip_l", "clip_l_tokenizer",
        }),
    }
    refused = {"weighted_captions": "Chroma has no way to weigh words"}
    ignored = ignored_options("Chroma", "Chroma takes the last layer of T5")
    foreign = {"clip_l_tokenizer": T5_ALONE}
    text_slots = {"t5xxl": "t5"}
    length_hangs_on_denoiser = False

    def _tokenizer_problems(self) -> list[str]:
        return self._t5_tokenizer_problems()

    def _sizes(self) -> list[tuple[str, str, int, int]]:
        return self._sizes_beside_clip()

    def _notices(self) -> list[str]:
        told = (
            "Chroma gets a guidance of 0, as it was trained (known trainers give it --guidance_scale, 3.5 by default)"
        )
        frozen = (
            "the approximator, which makes the modulations of all blocks, stays as it is unless --layer_lrs has a rate"
            f" for it: {APPROXIMATOR}=1e-6, say"
        )
        return [*super()._notices(), told, *([frozen] if WholeModelOptions in self.config else [])]

    def idle(self) -> list[Ignored]:
        return []

    def layer_rates(self) -> Mapping[str, float]:
        """Of a whole model that learns: the approximator was distilled from the modulations of a larger one, and is no
        part of what known trainers train, so it stays as it is."""
        return {APPROXIMATOR: 0.0} if WholeModelOptions in self.config else {}

    @cached_property
    def _denoiser_info(self) -> StreamModelInfo:
        from library.chroma_utils import inspect_chroma

        return inspect_chroma(self._denoiser_path)

    @property
    def max_token_length(self) -> int:
        return self.opts.t5xxl_max_token_length or TOKEN_LENGTH

    @property
    def masks_text(self) -> bool:
        return True

    @property
    def padded_texts(self) -> Sequence[PaddedText]:
        from library.chroma_models import KEPT_PADDING

        return (PaddedText("t5_attn_mask", ("t5_out", "txt_ids"), attended=KEPT_PADDING),)

    def _text_strategies(self) -> tuple[TokenizeStrategy, TextEncodingStrategy]:
        from library.strategy_chroma import ChromaTextEncodingStrategy, ChromaTokenizeStrategy

        tokenize = ChromaTokenizeStrategy(self.max_token_length, t5xxl_tokenizer=self._t5xxl_tokenizer)
        return tokenize, ChromaTextEncodingStrategy()

    @property
    def _loader(self) -> Callable[..., StreamTransformer]:
        from library.chroma_utils import load_chroma

        return load_chroma

    def _velocity(
        self, denoiser: torch.nn.Module, sample: NoisyLatents, conditioning: Conditioning, **inputs: object
    ) -> Course:
        from library.chroma_train_utils import predict_velocity

        return predict_velocity.course(denoiser, sample.noisy_latents, sample.timesteps, conditioning, **inputs)

    def pipeline_settings(self) -> Mapping[str, object]:
        return {}

    def metadata(self) -> dict[str, Plain]:
        return {**super().metadata(), "ss_base_model_version": FAMILY.name, "ss_guidance_scale": 0.0}

    def modelspec(self) -> dict[str, str | None]:
        return {"architecture": "chroma", "implementation": "https://huggingface.co/lodestones/Chroma"}
