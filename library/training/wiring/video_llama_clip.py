"""LlamaClipFamily: what the families of videos share whose captions LLaMA and CLIP-L read and whose autoencoder is that
of Hunyuan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from library.core.errors import Problems
from library.core.options import option
from library.core.registry import import_target
from library.training.option_groups import ModelOptions
from library.training.wiring.base import part_of, tokenizer_problems
from library.training.wiring.video import VideoFamily
from library.training.wiring.video_options import VideoOptions, dtype_name

if TYPE_CHECKING:
    import torch

    from library.dataset.strategies import StrategySet
    from library.strategy_llama_clip import LlamaClipTokenizeStrategy
    from library.training.accelerator_setup import Runtime

_FILES = {"text_encoder1": "llama", "text_encoder2": "clip_l"}


@dataclass(frozen=True, kw_only=True)
class LlamaClipOptions(VideoOptions):
    """Captions read by LLaMA and CLIP-L"""

    text_encoder1: str | None = option(None, help="file or folder of LLaMA 3, the language part of llava-llama-3-8b")
    text_encoder2: str | None = option(None, help="file or folder of the CLIP-L text encoder")
    text_encoder1_tokenizer: str | None = option(None, help="folder of the LLaMA tokenizer")
    text_encoder2_tokenizer: str | None = option(None, help="folder of the CLIP tokenizer")
    text_encoder_dtype: str | None = option(
        None, help="number format of the text encoders: fp32, fp16 or bf16; that of --mixed_precision when not given",
        convert=dtype_name,
    )
    fp8_llm: bool = option(False, help="keep the matrices of LLaMA in 8 bits")
    vae_chunk_size: int | None = option(
        None, help="frames that convolutions of the VAE compute at once: less memory, equal results; all when not given"
    )
    vae_tiling: bool = option(
        False, help="let the VAE compute frames larger than 256 pixels in tiles: little memory, close results"
    )
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help="pixels of a side of these tiles, a multiple of 8; asks for tiles too"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        if self.vae_chunk_size is not None and self.vae_chunk_size < 1:
            problems.add(f"--vae_chunk_size is {self.vae_chunk_size}; needed: 1 or more, e.g. 32")
        size = self.vae_spatial_tile_sample_min_size
        if size is not None and (size < 32 or size % 8):
            problems.add(
                f"--vae_spatial_tile_sample_min_size is {size}; needed: a multiple of 8 and at least 32, e.g. 256"
            )
        if self.text_encoder_dtype == "fp8":
            problems.add("--text_encoder_dtype is fp8; needed: fp32, fp16 or bf16 (--fp8_llm keeps LLaMA in 8 bits)")
        problems.raise_if_any()

    @property
    def tile_size(self) -> int | None:
        """Pixels of a side of the tiles in which the VAE computes; None = it does not."""
        return self.vae_spatial_tile_sample_min_size or (256 if self.vae_tiling else None)


class LlamaClipFamily(VideoFamily):
    """A family whose options derive from LlamaClipOptions."""

    options: ClassVar[type[LlamaClipOptions]]
    vae_kind: ClassVar[str]
    """kind of file that the autoencoder is"""
    text_strategy: ClassVar[str]
    """module:beginning of the names of its classes ...TokenizeStrategy and ...TextEncodingStrategy"""
    part_options = {
        "vae": frozenset({"vae_dtype", "vae_chunk_size", "vae_tiling", "vae_spatial_tile_sample_min_size"}),
        "text_encoders": frozenset(
            {
                "text_encoder1", "text_encoder2", "text_encoder1_tokenizer", "text_encoder2_tokenizer",
                "text_encoder_dtype", "fp8_llm",
            }
        ),
    }
    small_text_option = "fp8_llm"
    loading_options = {"vae": ("vae_dtype", "vae_chunk_size"), "text_encoders": ("text_encoder_dtype", "fp8_llm")}
    tool_defaults = {"latents": {"vae_dtype": "fp16"}, "text": {"text_encoder_dtype": "fp16"}}

    def part_files(self, part: str) -> Mapping[str, str | None]:
        if part == "vae":
            return {"vae": self._vae_path}
        clip = self.opts.text_encoder2
        return {
            "text_encoder1": self.opts.text_encoder1,
            "text_encoder2": None if clip is None else str(part_of(clip, "text_encoder_2")),
        }

    def _slot_problems(self, part: str) -> list[str]:
        from library.checkpoints.kinds import check_slot

        kinds = {"vae": self.vae_kind} if part == "vae" else _FILES
        files = self.part_files(part)
        found = [check_slot(files[name], name, {kind}, with_pickles=True) for name, kind in kinds.items()]
        return [problem for problem in found if problem]

    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the models do not have."""
        from library.components.llm_encoder_utils import inspect_llama
        from library.components.text_encoder_utils import inspect_clip_l

        first, second = self.part_files("text_encoders").values()
        return [
            *tokenizer_problems(
                lambda: self._tokenize.llama, lambda: inspect_llama(first)["vocab_size"], "LLaMA",
                "--text_encoder1_tokenizer", f"--text_encoder1 {first}",
            ),
            *tokenizer_problems(
                lambda: self._tokenize.clip_l, lambda: inspect_clip_l(second)["vocab"], "CLIP",
                "--text_encoder2_tokenizer", f"--text_encoder2 {second}",
            ),
        ]  # fmt: skip

    @cached_property
    def _tokenize(self) -> LlamaClipTokenizeStrategy:
        return import_target(f"{self.text_strategy}TokenizeStrategy")(
            self.config[ModelOptions].tokenizer_cache_dir, self.opts.text_encoder1_tokenizer,
            self.opts.text_encoder2_tokenizer, self.opts.text_encoder1,
        )  # fmt: skip

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        files = [] if self.lacks("text_encoders") else list(self.part_files("text_encoders").values())
        text = self.text_cache(trained, files)
        tokenize = None if self.lacks("text_encoders") else self._tokenize
        encoding = import_target(f"{self.text_strategy}TextEncodingStrategy")()
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS[self.name])

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.components.hunyuan_vae_utils import load_hunyuan_vae

        return load_hunyuan_vae(
            self._vae_path, self.vae_dtype(runtime), runtime.device, self._disable_mmap,
            chunk_frames=self.opts.vae_chunk_size, tile_size=self.opts.tile_size,
        )  # fmt: skip

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[LLaMA, CLIP-L]. In fewer bits are the linear layers of the first."""
        from library.components.llama_clip_utils import load_encoders
        from library.training.accelerator_setup import DTYPES

        wanted = self.opts.text_encoder_dtype
        dtype = runtime.weight_dtype if wanted is None else DTYPES["no" if wanted == "fp32" else wanted]
        return load_encoders(
            *self.part_files("text_encoders").values(), dtype, runtime.device, self._disable_mmap,
            form=self.text_form(runtime),
        )  # fmt: skip
