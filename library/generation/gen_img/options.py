"""The options of the image scripts for Stable Diffusion and SDXL (gen_img.py, sdxl_gen_img.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError, Problems, problems_of
from library.core.options import (
    LARGEST_BATCH,
    LARGEST_PICTURE_SIDE,
    LARGEST_SEED,
    LARGEST_STEPS,
    equivalent_option,
    option,
    refused_option,
)
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.generation.file_options import PictureFileOptions, wildcard_folder_problem
from library.generation.gen_img.prompts import GENERATION_LINE_OPTIONS
from library.generation.preview_options import PreviewOptions
from library.generation.speed_options import UnetSpeedOptions, attention_option
from library.training.inference_samplers import (
    DEFAULT_SAMPLER,
    SAMPLER_HELP,
    SAMPLER_NAMES,
    SD_SIGMA_TABLES,
    check_sampler,
    check_sd_table,
)
from library.training.sampling_prompts import DRAWN

DEFAULT_STRENGTH = 0.8
MODELS, LLLITE_MODELS = "control_net_models", "control_net_lllite_models"
EDGES = (32, 224)
"""thresholds of the Canny filter, as those of tools/canny.py"""
_TORCH_ATTENTION = "attention of torch is used, which chooses a fast kernel by itself; the pictures are the same"
_WIDE_HEADS = "heads of Stable Diffusion 1 are wider than SageAttention takes"
_NO_GUIDANCE = "guidance by CLIP or VGG features of a picture is not there; --image_path (img2img) follows a picture"


def _least(values: object, **least: float) -> list[str]:
    """Messages for options below their least value; None passes."""
    given = {name: getattr(values, name) for name in least}
    return [
        f"--{name} is {value}; needed: {least[name]} or more"
        for name, value in given.items()
        if value is not None and value < least[name]
    ]


def _raise(messages: list[str]) -> None:
    if messages:
        raise ConfigError(messages)


@dataclass(frozen=True, kw_only=True)
class GenerationModelOptions:
    """Models"""

    ckpt: str | None = option(None, help="checkpoint file or diffusers folder")
    sdxl: bool = option(False, help="the checkpoint is SDXL")
    v1: bool = option(
        False, help="the checkpoint is Stable Diffusion 1; that is assumed without --v2 and --sdxl as well"
    )
    v2: bool = option(False, help="the checkpoint is Stable Diffusion 2")
    v_parameterization: bool = option(False, help="the model predicts velocity; known of files that say so themselves")
    zero_terminal_snr: bool = option(
        False, help="rescale the noise schedule to end at zero signal, as the model was trained"
    )
    vae: str | None = option(None, help="file or folder of another autoencoder than the model's own")
    vae_batch_size: float | None = option(
        None, help="pictures that are decoded together; below 1 a fraction of --batch_size; 1 when not given"
    )
    vae_slices: int | None = equivalent_option(
        None, help="compute the autoencoder in this many slices",
        reason="--vae_slices: pictures are decoded whole, one at a time unless --vae_batch_size asks for more",
    )
    no_half_vae: bool = option(
        False, help="keep the autoencoder in float32 with --fp16 and --bf16 (SDXL's own needs it in float16)"
    )
    fp16: bool = option(False, help="compute in float16")
    bf16: bool = option(False, help="compute in bfloat16")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    clip_tokenizer: str | None = option(
        None, help="folder of the CLIP tokenizer, for models with a vocabulary of their own"
    )
    clip_skip: int | None = option(
        None, help="take the output of the n-th layer of the text encoder from the end; not for SDXL"
    )
    attn_mode: str = attention_option()
    xformers: bool = option(False, help="attention of xformers; without the package torch's serves")
    diffusers_xformers: bool = equivalent_option(
        False, help="attention of xformers through diffusers", reason=f"--diffusers_xformers: {_TORCH_ATTENTION}"
    )
    sdpa: bool = option(False, help="attention of torch, as without it")
    opt_channels_last: bool = option(
        False, help="keep feature maps with their channels last, which can be quicker on a GPU"
    )

    def __post_init__(self) -> None:
        problems = _least(self, vae_slices=1, clip_skip=1)
        chosen = [f"--{name}" for name in ("v1", "v2", "sdxl") if getattr(self, name)]
        if len(chosen) > 1:
            problems.append(f"{' and '.join(chosen)} are given; a checkpoint is one of them")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16 are both given; leave one out")
        if self.attn_mode == "sageattn" and not (self.sdxl or self.v2):
            problems.append(f"--attn_mode is sageattn; {_WIDE_HEADS}; needed: torch or xformers")
        if self.sdxl and self.clip_skip is not None:
            problems.append(
                f"--clip_skip is {self.clip_skip}; SDXL takes the last but one layer of both text encoders, leave it "
                "out"
            )
        if self.vae_batch_size is not None and self.vae_batch_size <= 0:
            problems.append(
                f"--vae_batch_size is {self.vae_batch_size}; needed: a number of pictures, or a fraction of "
                "--batch_size above 0"
            )
        _raise(problems)

    @property
    def not_optimized(self) -> Mapping[str, str]:
        """See `optimized.choose`."""
        return {} if self.sdxl or self.v2 else {"attn_mode": _WIDE_HEADS}

    @property
    def family(self) -> str:
        return "sdxl" if self.sdxl else "sd"

    @property
    def dtype(self) -> str:
        """Name in torch of the number format."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


@dataclass(frozen=True, kw_only=True)
class GenerationNetworkOptions:
    """Networks and embeddings"""

    network_module: list[str] | None = option(
        None,
        nargs="*",
        help="kind of each network, e.g. lora (any kind reads files of all), lycoris, or an importable module",
    )
    network_weights: list[str] | None = option(None, nargs="*", help="file of each network")
    network_mul: list[float] | None = option(None, nargs="*", help="multiplier of each network; 1 when not given")
    network_args: list[str] | None = option(
        None, nargs="*", help='arguments of each network as one text: "key=value;key=value"'
    )
    network_show_meta: bool = option(False, help="show the metadata of the network files")
    network_merge: bool = option(
        False, help="add all networks to the weights of the model; --am cannot change them then"
    )
    network_merge_n_models: int | None = option(None, help="add the first N networks to the weights, hook the others")
    network_pre_calc: bool = option(
        False, help="add the networks to the weights before each batch and take them out after it; --am works"
    )
    network_regional_mask_max_color_codes: int | None = option(
        None,
        help="regions of --mask_path are colour codes (red = bit 1, green = bit 2, blue = bit 3) up to this number, instead of channels",
    )
    textual_inversion_embeddings: list[str] | None = option(
        None, nargs="*",
        help="files of textual inversions; the name of a file without its ending is the word for prompts"
    )
    XTI_embeddings: list[str] | None = option(
        None, nargs="*",
        help="files of textual inversions with vectors for each layer of the U-Net of Stable Diffusion 1 and 2 "
        "(train_textual_inversion_XTI.py); named as --textual_inversion_embeddings"
    )
    clip_vision_strength: float | None = refused_option(
        None, help="guidance by a picture through CLIP vision", reason=_NO_GUIDANCE
    )

    def __post_init__(self) -> None:
        problems = Problems()
        count = len(self.network_weights or [])
        for name in ("network_module", "network_mul", "network_args"):
            given = getattr(self, name)
            if given is not None and len(given) != count or (name == "network_module" and given is None and count):
                problems.add(
                    f"--{name} has {len(given or [])} values for {count} files in --network_weights; give one for each "
                    "file"
                )
        if self.network_merge and self.network_pre_calc:
            problems.add(
                "--network_merge and --network_pre_calc are both given; the first adds the networks once, the second "
                "for each batch: leave one out"
            )
        if self.network_merge_n_models is not None and not 0 <= self.network_merge_n_models <= count:
            problems.add(
                f"--network_merge_n_models is {self.network_merge_n_models}; there are {count} networks, needed: 0 to "
                f"{count}"
            )
        codes = self.network_regional_mask_max_color_codes
        if codes is not None and not 1 <= codes <= 7:
            problems.add(f"--network_regional_mask_max_color_codes is {codes}; colours give codes from 1 to 7")
        problems.raise_if_any()

    @property
    def num_merged(self) -> int:
        return len(self.network_weights or []) if self.network_merge else self.network_merge_n_models or 0


@dataclass(frozen=True)
class GuideFile:
    """A net that follows guide pictures, as the options name it. `option`: the one that its file stands in; `ratio`:
    the part of the steps, from the first one, in which it works; `edges`: thresholds of the Canny filter that the
    picture goes through before, None = it is taken as it is."""

    path: str
    option: str
    multiplier: float
    ratio: float
    edges: tuple[int, int] | None

    @property
    def is_lllite(self) -> bool:
        return self.option == LLLITE_MODELS


@dataclass(frozen=True, kw_only=True)
class GenerationControlOptions:
    """ControlNet and LLLite"""

    control_net_models: list[str] | None = option(
        None, nargs="*", help="files or folders of ControlNets, in original or diffusers names"
    )
    control_net_lllite_models: list[str] | None = option(None, nargs="*", help="files of ControlNet-LLLites; SDXL")
    guide_image_path: list[str] | None = option(
        None, nargs="*",
        help="pictures, or folders of pictures, that the nets follow: one for each net, and in turn for the pictures"
        " that are made; a single one is for all nets",
    )
    control_net_preps: list[str] | None = option(
        None, nargs="*",
        help=f"what is done to the guide picture of each net: none, or canny_LOW_HIGH, its edges (canny alone:"
        f" canny_{EDGES[0]}_{EDGES[1]}); none when not given",
    )
    control_net_multipliers: list[float] | None = option(
        None, nargs="*", help="strength of each net, those of --control_net_models first; 1 when not given"
    )
    control_net_ratios: list[float] | None = option(
        None, nargs="*", help="part of the steps, from the first one, in which each net works; 1 when not given"
    )

    def __post_init__(self) -> None:
        problems, count = Problems(), len(self._files)
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios", "guide_image_path"):
            given = getattr(self, name)
            if given is None:
                continue
            if not count:
                problems.add(
                    f"--{name} is given without a net; name one with --control_net_models or"
                    " --control_net_lllite_models, or leave it out"
                )
            elif name != "guide_image_path" and len(given) != count:
                problems.add(f"--{name} has {len(given)} values for {count} nets; give one for each net")
        ratios = self.control_net_ratios or []
        if not all(0 <= ratio <= 1 for ratio in ratios):
            shown = " ".join(f"{ratio:g}" for ratio in ratios)
            problems.add(f"--control_net_ratios is {shown}; needed: parts of the steps, each from 0 to 1")
        for prep in self.control_net_preps or []:
            problems.attempt(lambda: _edges_of(prep))
        if count and not self.guide_image_path:
            problems.add(f"--{self._files[0][0]} is given without --guide_image_path, the pictures that nets follow")
        problems.raise_if_any()

    @property
    def _files(self) -> list[tuple[str, str]]:
        """(option, file) of all nets in their order."""
        return [(name, path) for name in (MODELS, LLLITE_MODELS) for path in getattr(self, name) or []]

    @property
    def guides(self) -> list[GuideFile]:
        """The nets in their order, with their settings."""
        files = self._files
        multipliers, ratios = (
            given or [1.0] * len(files) for given in (self.control_net_multipliers, self.control_net_ratios)
        )
        preps = self.control_net_preps or ["none"] * len(files)
        return [
            GuideFile(path, name, multiplier, ratio, _edges_of(prep))
            for (name, path), multiplier, ratio, prep in zip(files, multipliers, ratios, preps, strict=True)
        ]


def _edges_of(prep: str) -> tuple[int, int] | None:
    """Thresholds of a preprocessor; None = none. ConfigError for another one."""
    if prep == "none":
        return None
    name, *numbers = prep.split("_")
    if name == "canny" and len(numbers) in (0, 2) and all(number.isascii() and number.isdigit() for number in numbers):
        lower, upper = map(int, numbers) if numbers else EDGES
        if lower <= upper:
            return lower, upper
    raise ConfigError(
        f"--control_net_preps has '{prep}'; needed: none, canny, or canny_LOW_HIGH with two thresholds, e.g."
        " canny_63_191"
    )


@dataclass(frozen=True, kw_only=True)
class GenerationPromptOptions:
    """Prompts"""

    prompt: str | None = option(
        None, help=f"prompt, with options: {' '.join('--' + name for name in GENERATION_LINE_OPTIONS)}"
    )
    from_file: str | None = option(
        None, help="text file with one prompt per line; lines that begin with # are left out"
    )
    from_module: str | None = option(
        None, help="Python file with get_prompter(options, pipeline, networks), which gives prompt lines"
    )
    prompter_module_args: str | None = option(None, help="text for that module, which finds it in its options")
    interactive: bool = option(False, help="ask for prompts, one per line; an empty line ends")
    no_preview: bool = equivalent_option(
        False, help="no window with the pictures in interactive mode",
        reason="--no_preview: no window is opened in any case"
    )
    n_iter: int = option(1, help="rounds over all prompts")
    images_per_prompt: int = option(1, help="pictures of each prompt and round")
    batch_size: int = option(1, help="pictures that are made together", most=LARGEST_BATCH)
    shuffle_prompts: bool = option(False, help="put the prompts into another order for each round")
    seed: int | None = option(
        None, convert=seed_of,
        help="the picture's seed, a number or any text, or with several pictures what their seeds are drawn from; a drawn one is shown when not given, or with -1",
        most=LARGEST_SEED,
    )
    prompt_wildcards: str | None = option(
        None, metavar="FOLDER", help="folder of NAME.txt files, a line of which stands for each __NAME__ of a prompt, drawn"
        " by the seed; lines are TEXT or TEXT:WEIGHT",
    )  # fmt: skip
    iter_same_seed: bool = option(False, help="the same seed for all prompts of a round")
    max_embeddings_multiples: int | None = option(
        None, help="longest prompt in rows of 75 tokens; 1 when not given", most=1000
    )
    emb_normalize_mode: str = option(
        "original",
        choices=("original", "none", "abs"),
        help="what brings weighted prompts back to their size: their mean (original, can distort), nothing, or their mean absolute value (abs, recommended)",
    )

    def __post_init__(self) -> None:
        problems = _least(self, n_iter=1, images_per_prompt=1, batch_size=1, seed=DRAWN, max_embeddings_multiples=1)
        wildcards = wildcard_folder_problem(self.prompt_wildcards)
        problems += [wildcards] if wildcards else []
        sources = [f"--{name}" for name in ("prompt", "from_file", "from_module", "interactive") if getattr(self, name)]
        if len(sources) > 1:
            problems.append(f"{' and '.join(sources)} are given; prompts come from one of them")
        if self.interactive and (self.n_iter > 1 or self.shuffle_prompts):
            problems.append(
                "--n_iter and --shuffle_prompts are about rounds, and --interactive has none; leave them out"
            )
        if self.prompter_module_args is not None and not self.from_module:
            problems.append(
                "--prompter_module_args is given without --from_module, the module that takes them; add it, or leave "
                "it out"
            )
        _raise(problems)


@dataclass(frozen=True, kw_only=True)
class GenerationPictureOptions(PictureFileOptions):
    """Pictures"""

    outdir: str = option("outputs", help="folder of the pictures; made when missing")
    sequential_file_name: bool = option(False, help="number the files: im_000001")
    use_original_file_name: bool = option(False, help="name the files after those of --image_path")
    W: int | None = option(
        None, help="width in pixels; 512, SDXL 1024, or that of --image_path when not given", most=LARGEST_PICTURE_SIDE
    )
    H: int | None = option(None, help="height in pixels", most=LARGEST_PICTURE_SIDE)
    steps: int = option(50, help="steps", most=LARGEST_STEPS)
    sampler: str = option(DEFAULT_SAMPLER, help="sampler: " + ", ".join(SAMPLER_NAMES) + SAMPLER_HELP)
    sigma_table: str | None = option(
        None, choices=SD_SIGMA_TABLES, help="noise levels of the steps, over those of the training; those of the"
        " sampler when not given",
    )  # fmt: skip
    scale: float = option(
        7.5, help="strength of the prompt against the negative prompt (classifier-free guidance); up to 1 = off"
    )
    negative_scale: float | None = option(
        None,
        help="strength of the negative prompt of its own: both prompts are then seen from the empty one (three forwards per step)",
    )
    original_height: int | None = option(None, help="SDXL: original height; the picture's when not given")
    original_width: int | None = option(None, help="SDXL: original width")
    original_height_negative: int | None = option(
        None, help="SDXL: original height for the negative prompt; as for the prompt when not given"
    )
    original_width_negative: int | None = option(None, help="SDXL: original width for the negative prompt")
    crop_top: int | None = option(None, help="SDXL: rows cropped above; 0 when not given")
    crop_left: int | None = option(None, help="SDXL: columns cropped on the left; 0 when not given")
    pyramid_noise_prob: float | None = option(
        None, least=0, most=1, help="part of the pictures that start from pyramid noise"
    )
    pyramid_noise_discount_range: list[float] | None = option(
        None, nargs=2, least=0, most=1,
        help="least and largest weight of its next coarser level; 0.5 0.9 when not given",
    )
    noise_offset_prob: float | None = option(
        None, least=0, most=1, help="part of the pictures whose start noise gets an offset"
    )
    noise_offset_range: list[float] | None = option(
        None, nargs=2, least=0, help="least and largest offset; 0.01 0.2 when not given"
    )

    def __post_init__(self) -> None:
        problems = _least(
            self, W=64, H=64, steps=1, original_height=1, original_width=1, original_height_negative=1,
            original_width_negative=1,
            crop_top=0, crop_left=0,
        )
        problems += problems_of(self.raise_file_problems)
        sampler_problems = problems_of(lambda: check_sampler(self.sampler, "--sampler"))
        problems += sampler_problems or problems_of(
            lambda: check_sd_table(self.sigma_table, "--sigma_table", self.sampler)
        )
        if self.steps > 1000:
            problems.append(f"--steps is {self.steps}; the noise schedule has 1000, needed: as many or fewer")
        for name in ("pyramid_noise_discount_range", "noise_offset_range"):
            value = getattr(self, name)
            if value is not None and value[0] > value[1]:
                problems.append(f"--{name} is {value[0]} {value[1]}; needed: the least value, then the largest")
        _raise(problems)


@dataclass(frozen=True, kw_only=True)
class GenerationSourceOptions:
    """From pictures"""

    image_path: str | None = option(None, help="picture, or folder of pictures, to start from; they take turns")
    mask_path: str | None = option(
        None,
        help="with --image_path: what is white is made anew. Without it: regions for the parts of a prompt between AND"
    )
    strength: float | None = option(
        None, help=f"part of the steps that are made, from 0 to 1; {DEFAULT_STRENGTH} when not given"
    )
    force_scheduler_zero_steps_offset: bool = option(False, help="count timesteps from 0 instead of 1")
    highres_fix_scale: float | None = option(
        None, help="make pictures at this part of their size first, then enlarge and refine them"
    )
    highres_fix_steps: int = option(28, help="steps of the small picture", most=LARGEST_STEPS)
    highres_fix_strength: float | None = option(
        None, help="--strength for a small picture that starts from --image_path; as --strength when not given"
    )
    highres_fix_save_1st: bool = option(False, help="write the small pictures too")
    highres_fix_latents_upscaling: bool = option(False, help="enlarge latents (bicubic) instead of pictures")
    highres_fix_upscaler: str | None = option(None, help="module that enlarges, with create_upscaler(**arguments)")
    highres_fix_upscaler_args: str | None = option(None, help='its arguments: "key=value;key=value"')
    highres_fix_disable_control_net: bool = option(
        False, help="ControlNets and LLLites guide the small picture alone, not what refines it"
    )

    def __post_init__(self) -> None:
        problems = []
        for name in ("strength", "highres_fix_strength"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                problems.append(f"--{name} is {value}; needed: from 0 to 1")
        if self.highres_fix_scale is None:
            given = [
                name
                for name in ("strength", "save_1st", "latents_upscaling", "upscaler", "disable_control_net")
                if getattr(self, f"highres_fix_{name}") not in (None, False)
            ]
            problems += [f"--highres_fix_{name} is given without --highres_fix_scale" for name in given]
        elif not 0 < self.highres_fix_scale < 1:
            problems.append(f"--highres_fix_scale is {self.highres_fix_scale}; needed: above 0 and below 1, e.g. 0.5")
        if self.highres_fix_latents_upscaling and self.highres_fix_upscaler:
            problems.append("--highres_fix_latents_upscaling and --highres_fix_upscaler are both given; leave one out")
        if self.highres_fix_upscaler_args and not self.highres_fix_upscaler:
            problems.append(
                "--highres_fix_upscaler_args is given without --highres_fix_upscaler, which takes them; add it, or "
                "leave it out"
            )
        _raise([*problems, *_least(self, highres_fix_steps=1)])


@dataclass(frozen=True, kw_only=True)
class GenerationShrinkOptions:
    """Larger pictures than the model was trained for: Deep Shrink, gradual latent"""

    ds_depth_1: int | None = option(
        None, help="Deep Shrink: block of the way down before which the features are made smaller; off when not given"
    )
    ds_timesteps_1: int = option(650, least=0, most=1000, help="from the first timestep down to this one")
    ds_depth_2: int | None = option(None, help="second block, for the timesteps after that")
    ds_timesteps_2: int = option(650, least=0, most=1000, help="down to this one")
    ds_ratio: float = option(0.5, help="factor of the sides")
    gradual_latent_timesteps: int | None = option(
        None, least=0, most=1000,
        help="gradual latent (with --sampler euler_a): latents begin smaller and grow below this timestep; off when not given",
    )
    gradual_latent_ratio: float = option(0.5, help="factor of the sides at the beginning")
    gradual_latent_ratio_step: float = option(0.125, help="growth of that factor at a time")
    gradual_latent_every_n_steps: int = option(3, help="steps from one growth to the next")
    gradual_latent_s_noise: float = option(1.0, help="factor of the sampler's noise")
    gradual_latent_unsharp_params: str | None = option(
        None,
        help="kernel size, sigma, strength, and 1 or 0: sharpen the latents or their noise after growth, e.g. 3,0.5,0.5,1",
    )

    def __post_init__(self) -> None:
        problems = _least(self, ds_depth_1=0, ds_depth_2=0, gradual_latent_every_n_steps=1, gradual_latent_s_noise=0)
        for name in ("ds_ratio", "gradual_latent_ratio", "gradual_latent_ratio_step"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(f"--{name} is {getattr(self, name)}; needed: above 0, at most 1")
        if self.ds_depth_2 is not None and self.ds_depth_1 is None:
            problems.append("--ds_depth_2 is given without --ds_depth_1, the first depth; add it, or leave both out")
        if self.gradual_latent_unsharp_params is not None:
            try:
                self.unsharp
            except ValueError as error:
                problems.append(f"--gradual_latent_unsharp_params is '{self.gradual_latent_unsharp_params}'; {error}")
        _raise(problems)

    @property
    def unsharp(self) -> tuple[float, ...] | None:
        text = self.gradual_latent_unsharp_params
        return None if text is None else GENERATION_LINE_OPTIONS["glus"].convert(text)


GENERATION_CLASSES = (
    PluginOptions,
    GenerationModelOptions, UnetSpeedOptions, GenerationPromptOptions, GenerationPictureOptions, GenerationSourceOptions,
    GenerationNetworkOptions, GenerationControlOptions,
    GenerationShrinkOptions, PreviewOptions,
)
