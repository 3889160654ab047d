"""Pictures as they are asked for, and what the options of image scripts have in common: records without torch.

A family's own records are in `<family>_options.py`; its pipeline and its script both build on them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from library.core.errors import ConfigError
from library.core.options import option
from library.generation.file_options import PictureFileOptions, wildcard_folder_problem
from library.generation.guidance_options import asks_guidance
from library.training.sampling_prompts import DRAWN, LineOption, read_number, read_picture_side, read_seed, read_steps

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPE_NAMES: dict[str, str] = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn", "fp8": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "e4m3fn": "float8_e4m3fn",
}  # fmt: skip
"""spellings of a number format -> its name in torch"""
OUTPUT_TYPES = ("images", "latent", "latent_images")
"""what scripts write that know files of latents"""

SAMPLE_NAMES: Mapping[str, str] = {
    "frames": "frame_count", "steps": "sample_steps", "cfg_scale": "scale", "guidance": "guidance_scale",
    "sampler": "sample_sampler",
}  # fmt: skip
"""fields of requests that have another name in sample prompts (whose own `cfg_scale` is that of video families)"""
VIDEO_SAMPLE_NAMES: Mapping[str, str] = {
    **SAMPLE_NAMES, "cfg_scale": "cfg_scale", "flow_shift": "discrete_flow_shift",
    "embedded_guidance_scale": "guidance_scale", "control_path": "control_video_path",
    "control_image_paths": "control_image_path",
}  # fmt: skip
"""the same for families of clips"""


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """One picture, as asked for. `multipliers`: strengths of the adapters, None = as loaded. `cfg_schedule` and what
    follows are the options of GuidanceOptions."""

    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    frames: int = 1
    steps: int | None = None
    seed: int | None = None
    cfg_scale: float = 1.0
    multipliers: tuple[float, ...] | None = None
    cfg_schedule: str | None = None
    cfgzerostar_scaling: bool = False
    cfgzerostar_init_steps: int = 0
    cfgzerostar_multiplier: float = 0.0
    perp_neg: float | None = None
    sampler: str | None = None
    """None: that of the pipeline"""
    sigma_table: str | None = None
    """noise levels of the steps, None: those of the family"""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, or one text for each tokenizer where they read different ones."""
        return (self.prompt,)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The texts of each row of the conditioning: of one, but where parts of a clip have texts of their own."""
        return (self.texts,)

    @property
    def negative_text(self) -> str | None:
        """The text that guidance leads away from; None = one forward per step."""
        return self.negative_prompt or "" if self.is_guided else None

    @property
    def is_guided(self) -> bool:
        """Whether some step may be guided away from the negative text."""
        return self.cfg_scale != 1.0 or (self.cfg_schedule is not None and asks_guidance(self.cfg_schedule))

    @property
    def further_texts(self) -> dict[str, str]:
        """Texts that guidance reads beside the prompt and the negative one, by what they are for."""
        return {"neutral": ""} if self.perp_neg is not None and self.negative_text is not None else {}

    def at_scale(self, scale: float | None) -> Self:
        """The same for steps of one scale, without a schedule; None = that of the request itself."""
        return dataclasses.replace(self, cfg_schedule=None, **({} if scale is None else {"cfg_scale": scale}))

    @property
    def made_steps(self) -> int | None:
        """How many of the steps are made."""
        return self.steps


@dataclass(frozen=True, kw_only=True)
class SampledRequest(PictureRequest):
    """A picture of a family whose sampler can be chosen."""

    sampler: str = dataclasses.field()


Request = TypeVar("Request", bound=PictureRequest)
LARGEST_DRAWN_SEED = 2**32 - 1


def request_of(request_class: type[Request], settings: Any, names: Mapping[str, str] = {}) -> Request:
    """A request from a record that has fields of the same names, or of those in `names`; what it lacks or leaves open
    (None) has the request's default."""
    found = {
        field.name: getattr(settings, names.get(field.name, field.name), None)
        for field in dataclasses.fields(request_class)
    }
    return request_class(**{name: value for name, value in found.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class SessionOptions(PictureFileOptions):
    """Where prompts come from, and how files are written"""

    interactive: bool = option(False, help="load the models once and ask for prompts, one per line; an empty line ends")
    from_file: str | None = option(
        None, help="text file with one prompt per line, with options behind it; # begins a comment line"
    )

    prompt_weighting: bool = option(
        False, help="weights of words in prompts: (words:1.4), (words) 1.1, [words] 0.91; \\( is a bracket"
    )
    prompt_wildcards: str | None = option(
        None, metavar="FOLDER", help="folder of NAME.txt files, a line of which stands for each __NAME__ of a prompt, drawn"
        " by the seed; lines are TEXT or TEXT:WEIGHT",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.raise_file_problems()
        problem = wildcard_folder_problem(self.prompt_wildcards)
        if problem:
            raise ConfigError(problem)
        if self.interactive and self.from_file:
            raise ConfigError(
                "--interactive and --from_file are both given; prompts come from one place, leave one out"
            )


def taken_seed(request: PictureRequest) -> int:
    """The seed of a request, or a drawn one."""
    return random.SystemRandom().randint(0, LARGEST_DRAWN_SEED) if request.seed in (None, DRAWN) else request.seed


# -- prompt lines ------------------------------------------------------------------------------------------------------


def read_negative(text: str) -> str:
    """A negative prompt of a line; `-` stands for an empty one."""
    return "" if text == "-" else text


def read_multipliers(text: str) -> tuple[float, ...]:
    return tuple(read_number(part.strip()) for part in text.split(","))


COMMON_LINE_OPTIONS: Mapping[str, LineOption] = {
    "w": LineOption("width", read_picture_side), "h": LineOption("height", read_picture_side),
    "s": LineOption("steps", read_steps),
    "d": LineOption("seed", read_seed), "n": LineOption("negative_prompt", read_negative),
    "m": LineOption("multipliers", read_multipliers),
}  # fmt: skip
"""letters of a prompt line that every image script has"""


def guidance_letters(embedded: LineOption | None = None) -> dict[str, LineOption]:
    """The letters of guidance, those of all known scripts together: `--l` and `--c` are the scale of the prompt against
    the negative prompt, and so is `--g`, unless the family has an `embedded` guidance, which it stands for."""
    scale = LineOption("cfg_scale", read_number)
    return {"l": scale, "c": scale, "g": embedded or scale}


# -- checks of option groups -------------------------------------------------------------------------------------------


def dtype_problem(name: str, value: str | None) -> str | None:
    """A message for a number format that is not known, or None."""
    if value is None or value.lower() in DTYPE_NAMES:
        return None
    return f"--{name} is '{value}'; known: {', '.join(DTYPE_NAMES)}"


def too_small_problems(values: Any, *least: tuple[str, int]) -> list[str]:
    """Messages for options of a group that are below their least value; None passes."""
    return [
        f"--{name} is {getattr(values, name)}; needed: {number} or more"
        for name, number in least
        if getattr(values, name) is not None and getattr(values, name) < number
    ]
