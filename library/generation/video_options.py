"""What video scripts are asked, whichever family they are of: option groups without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from library.core.errors import ConfigError
from library.core.options import (
    LARGEST_PICTURE_SIDE,
    LARGEST_SEED,
    LARGEST_STEPS,
    equivalent_option,
    option,
)
from library.core.text_seeds import seed_of
from library.generation.adapter_files import LayerFilter, ListedAdapterOptions
from library.generation.requests import DTYPE_NAMES, dtype_problem, too_small_problems
from library.generation.speed_options import attention_option, fast_products_option, scaled_weights_option
from library.generation.video_requests import (
    CFG_SKIP_MODES,
    CODEC_ENDINGS,
    LATENT_OUTPUTS,
    MOST_FREQUENCIES,
    NOISE_MODES,
    PAD_MODES,
    SLG_MODES,
    VIDEO_OUTPUT_TYPES,
    SkipLayers,
)
from library.training.sampling_prompts import DRAWN, MOST_FRAMES

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_DYNAMIC = {"true": True, "false": False, "auto": None}


@dataclass(frozen=True, kw_only=True)
class VideoModelOptions:
    """Models

    A family has further ones, and says in its own words which files it wants.
    """

    dit: str | None = option(None, help="file of the denoiser")
    dit_dtype: str = option("bfloat16", help=f"number format of the denoiser: {', '.join(DTYPE_NAMES)}")
    vae: str | None = option(None, help="file of the autoencoder")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    device: str | None = option(
        None, help="device of the denoiser, e.g. cuda:1; the first GPU when not given, else the CPU"
    )
    fp8: bool = option(False, help="keep the large matrices of the denoiser in 8 bits, as they are")
    fp8_scaled: bool = scaled_weights_option()
    fp8_fast: bool = fast_products_option()
    blocks_to_swap: int = option(0, help="blocks whose weights wait in main memory")
    use_pinned_memory_for_block_swap: bool = equivalent_option(
        False, help="pinned memory for swapped blocks",
        reason="--use_pinned_memory_for_block_swap: swapped blocks wait in page-locked memory in any case",
    )  # fmt: skip
    attn_mode: str = attention_option()

    def model_problems(self) -> list[str]:
        """What is wrong with formats and numbers of blocks."""
        found = too_small_problems(self, ("blocks_to_swap", 0))
        for name in ("dit_dtype", "vae_dtype"):
            value = getattr(self, name, None)
            problem = dtype_problem(name, value)
            if problem is None and value is not None and DTYPE_NAMES[value.lower()].startswith("float8"):
                problem = f"--{name} is {value}; 8 bits are for the denoiser only: --fp8 or --fp8_scaled"
            found += [problem] if problem else []
        return found

    @property
    def is_plain_fp8(self) -> bool:
        """Whether 8-bit numbers stand for themselves, without scales."""
        return self.fp8 and not self.fp8_scaled

    @property
    def form(self) -> str | None:
        """How the large matrices of the denoiser are stored, one of library.checkpoints.weight_forms.FORMS."""
        return "fp8_scaled" if self.fp8_scaled else "fp8" if self.fp8 else None

    @property
    def multiplies_fp8(self) -> bool:
        """Whether products are those of 8-bit numbers."""
        return self.fp8_fast and self.fp8_scaled

    @property
    def is_fp8(self) -> bool:
        return self.fp8 or self.fp8_scaled

    @property
    def dit_dtype_name(self) -> str:
        return DTYPE_NAMES[self.dit_dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Compilation"""

    compile: bool = option(False, help="compile the blocks of the denoiser with torch.compile")
    compile_backend: str = option("inductor", help="backend of --compile")
    compile_mode: str = option("default", choices=COMPILE_MODES, help="mode of --compile")
    compile_dynamic: str | None = option(
        None, choices=tuple(COMPILE_DYNAMIC), help="whether sizes may change without compiling anew; auto if not given"
    )
    compile_fullgraph: bool = option(False, help="compile each block as one graph, or fail")
    compile_cache_size_limit: int | None = option(None, help="how many variants of a block are kept", least=1)

    @property
    def dynamic(self) -> bool | None:
        return COMPILE_DYNAMIC[self.compile_dynamic or "auto"]


@dataclass(frozen=True, kw_only=True)
class OldCompileOptions(CompileOptions):
    """Compilation"""

    compile_args: list[str] | None = option(
        None, nargs=4, metavar="TEXT", help="--compile with backend, mode, dynamic and fullgraph, as older ones have it"
    )

    def __post_init__(self) -> None:
        if self.compile_args is None:
            return
        backend, mode, dynamic, fullgraph = self.compile_args
        problems = []
        if mode.lower() not in COMPILE_MODES:
            problems.append(f"--compile_args has the mode '{mode}'; needed: {', '.join(COMPILE_MODES)}")
        for name, value, known in (("dynamic", dynamic, COMPILE_DYNAMIC), ("fullgraph", fullgraph, ("true", "false"))):
            if value.lower() not in known:
                problems.append(f"--compile_args has {name} '{value}'; needed: {', '.join(known)}")
        if problems:
            raise ConfigError(problems)
        read = {
            "compile": True, "compile_backend": backend, "compile_mode": mode.lower(),
            "compile_dynamic": dynamic.lower(), "compile_fullgraph": fullgraph.lower() == "true",
        }  # fmt: skip
        for name, value in read.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class VideoAdapterOptions(ListedAdapterOptions):
    """LoRAs"""

    include_patterns: list[str] | None = option(
        None, nargs="*", help="use only the layers that this regular expression finds: the first one in the first of"
        " the --lora_weight, the second one in the second, and so on; one alone counts for all"
    )  # fmt: skip
    exclude_patterns: list[str] | None = option(
        None, nargs="*", help="leave out the layers that this regular expression finds, of each file in the same way"
    )
    merge_lora_weights: bool = option(
        True, help="add the adapters to the weights; --no-merge_lora_weights hooks them, for --m in prompt lines"
    )
    merged_by_default: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems: list[str] = []
        files = len(self.lora_weight or ())
        for name in ("include_patterns", "exclude_patterns"):
            patterns = getattr(self, name) or ()
            if len(patterns) > 1 and len(patterns) != files:
                problems.append(
                    f"--{name} has {len(patterns)} values for {files} --lora_weight; give one for each file, or one"
                    " for all"
                )
        try:
            super().__post_init__()
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def further_exclude(self) -> tuple[str, ...]:
        """Patterns of layers that are left out of every file."""
        return ()

    def filter_of(self, number: int) -> LayerFilter:
        """Of the file with this number."""

        def own(patterns: list[str] | None) -> tuple[str, ...]:
            if not patterns:
                return ()
            return (patterns[0] if len(patterns) == 1 else patterns[number],)

        return LayerFilter(own(self.include_patterns), (*own(self.exclude_patterns), *self.further_exclude))


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Videos"""

    size_step: ClassVar[int] = 16
    """what both sides are rounded down to a multiple of"""

    prompt: str | None = option(None, help="what the video shows")
    negative_prompt: str | None = option(None, help="what it should not show, where --guidance_scale is not 1")
    video_size: tuple[int, ...] = option(
        (256, 256), nargs=2, metavar="PIXELS", help="height and width", most=LARGEST_PICTURE_SIDE
    )
    fps: float = option(24, help="frames per second of the video file", most=1000)
    infer_steps: int | None = option(50, help="steps", most=LARGEST_STEPS)
    guidance_scale: float | None = option(
        1.0, help="classifier-free guidance: away from --negative_prompt; 1 = off, else two forwards per step"
    )
    split_uncond: bool = option(False, help="both forwards of guidance one after the other: less memory")
    flow_shift: float | None = option(None, help="how far the steps lie towards noise; 1 = evenly spaced")
    seed: int | None = option(
        None, convert=seed_of, help="number, or any text, that fixes the video; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    save_path: str | None = option(None, help="folder of the videos; made when missing")
    output_type: str = option(
        "video", choices=VIDEO_OUTPUT_TYPES,
        help="what is written: a video file, its frames as pictures, its latents (safetensors), latents and video, or"
        " latents and frames",
    )  # fmt: skip
    latent_path: list[str] | None = option(None, nargs="*", help="decode these latents instead of making new ones")
    container: str = option(
        "mp4", choices=("mp4", "mov", "mkv", "avi", "webm"), help="kind of the video file; mkv and webm need PyAV"
    )
    codec: str | None = option(
        None, choices=tuple(CODEC_ENDINGS),
        help="nearly without loss as H.264, H.265 or ProRes 422 HQ, through PyAV; when not given H.264 of 4 Mbit/s, or"
        " what the machine has. prores makes mkv of mp4",
    )  # fmt: skip
    keep_pngs: bool = option(False, help="write the frames as pictures beside the video, in a folder of its name")

    def clip_problems(self) -> list[str]:
        """What is out of range or contradicts itself."""
        problems = too_small_problems(self, ("infer_steps", 1), ("seed", DRAWN))
        if len(self.video_size) != 2 or min(self.video_size) < self.size_step:
            size = " ".join(map(str, self.video_size))
            problems.append(f"--video_size is {size}; needed: height and width, {self.size_step} or more each")
        if self.flow_shift is not None and not self.flow_shift > 0:
            problems.append(f"--flow_shift is {self.flow_shift}; needed: a number above 0")
        if not self.fps > 0:
            problems.append(f"--fps is {self.fps}; needed: a number above 0")
        if self.latent_path and self.output_type in LATENT_OUTPUTS:
            problems.append(
                f"--output_type is {self.output_type} and --latent_path gives latents already; use --output_type video"
                " or images"
            )
        return problems

    @property
    def output_dir(self) -> str | None:
        return self.save_path

    @property
    def video_ending(self) -> str:
        """That of --container; where mp4 cannot hold the codec, the one that is written instead."""
        known = CODEC_ENDINGS.get(self.codec or "", ())
        return known[0] if known and self.container == "mp4" and ".mp4" not in known else f".{self.container}"

    def request_fields(self) -> dict[str, Any]:
        """Fields of a VideoRequest that these options say."""
        height, width = self.video_size
        return dict(
            prompt=self.prompt or "", negative_prompt=self.negative_prompt, width=width, height=height,
            fps=self.fps, steps=self.infer_steps, cfg_scale=self.guidance_scale,
            flow_shift=self.flow_shift, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LengthOptions(ClipOptions):
    """Videos of so many frames"""

    video_length: int | None = option(81, help="frames, rounded down to 4 n + 1", least=1, most=MOST_FRAMES)

    def request_fields(self) -> dict[str, Any]:
        return dict(super().request_fields(), frames=self.video_length)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """A clip to start from"""

    video_path: str | None = option(
        None, flags=("--i2i_path",), help="video file, animated picture or folder of frames, whose first frames the video is made of"
    )
    strength: float = option(
        0.8, flags=("--denoise_strength", "--v2v_denoise"), least=0, most=1,
        help="share of the steps that change --video_path, 0 to 1; in the noise mode direct the noise level from which",
    )  # fmt: skip
    noise_mode: str = option(
        "traditional", choices=NOISE_MODES, flags=("--v2v_noise_mode",),
        help="which steps change --video_path: traditional, the last --strength of them, or direct, those from the noise"
        " level on that is nearest to --strength",
    )  # fmt: skip
    v2_extra_noise: float = option(
        0.0, flags=("--v2v_extra_noise",), least=0,
        help="so much more of the noise on --video_path; useful from 0.01 to 0.02",
    )  # fmt: skip
    v2v_pad_mode: str = option(
        "end", choices=PAD_MODES, help="which end of a --video_path that is too short is repeated"
    )

    def request_fields(self) -> dict[str, Any]:
        return dict(
            video_path=self.video_path, strength=self.strength, pad_mode=self.v2v_pad_mode, noise_mode=self.noise_mode,
            v2_extra_noise=self.v2_extra_noise,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LongClipOptions:
    """Longer clips, and noise on the first frame"""

    i2_extra_noise: float = option(
        0.0, flags=("--i2v_extra_noise",), least=0,
        help="noise on the latents of --image_path, for more movement; useful from 0.02 to 0.04",
    )  # fmt: skip
    riflex_index: int = option(
        0, least=0, most=MOST_FREQUENCIES,
        help="RifleX: which frequency of time, counted from 1, is slowed down for clips that are longer than those of the"
        " training; the page of the script says which; 0 = none",
    )  # fmt: skip

    def request_fields(self) -> dict[str, Any]:
        return dict(i2_extra_noise=self.i2_extra_noise, riflex_index=self.riflex_index)


@dataclass(frozen=True, kw_only=True)
class StepGuidanceOptions:
    """Guidance in some of the steps"""

    cfg_skip_mode: str = option(
        "none", choices=CFG_SKIP_MODES,
        help="which steps go without guidance: the early, late or middle ones, those at both ends, or every few",
    )  # fmt: skip
    cfg_apply_ratio: float | None = option(None, help="share of the steps that are guided", least=0, most=1)
    slg_layers: str | None = option(None, help="numbers of blocks that skip-layer guidance leaves out, as 4,5,6")
    slg_scale: float = option(3.0, help="how strongly --slg_mode original leads away from the forward without them")
    slg_start: float = option(0.0, help="share of the steps before skip-layer guidance", least=0, most=1)
    slg_end: float = option(0.3, help="share of the steps at which it ends", least=0, most=1)
    slg_mode: str | None = option(
        None, choices=SLG_MODES,
        help="original: beside plain guidance; uncond: in the place of the forward for the negative prompt",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = []
        if self.slg_layers is not None and _layers(self.slg_layers) is None:
            problems.append(f"--slg_layers is '{self.slg_layers}'; needed: numbers of blocks with commas, as 4,5,6")
        if problems:
            raise ConfigError(problems)

    def request_fields(self) -> dict[str, Any]:
        skip = None
        if self.slg_layers and self.slg_mode:
            skip = SkipLayers(
                layers=_layers(self.slg_layers) or (), mode=self.slg_mode, scale=self.slg_scale, start=self.slg_start,
                end=self.slg_end,
            )  # fmt: skip
        return dict(cfg_skip_mode=self.cfg_skip_mode, cfg_apply_ratio=self.cfg_apply_ratio, skip_layers=skip)


def _layers(text: str) -> tuple[int, ...] | None:
    """Numbers with commas, or None."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        return None
    return numbers if numbers and min(numbers) >= 0 else None
