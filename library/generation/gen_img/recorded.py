"""What the pictures of gen_img.py tell of how they were made, and options from it: a picture made again is alone in its
run, with everything that its line, its draws and its turn decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.core.options import Config, option_fields
from library.generation.gen_img.options import (
    GENERATION_CLASSES,
    GenerationControlOptions,
    GenerationModelOptions,
    GenerationNetworkOptions,
    GenerationPictureOptions,
    GenerationPromptOptions,
    GenerationShrinkOptions,
    GenerationSourceOptions,
)
from library.generation.gen_img.plan import DeepShrinkSettings, GradualLatentSettings, ImageRequest
from library.generation.gen_img.sources import finished_line, source_files
from library.generation.recorded_files import option_values, settings_of_file
from library.generation.recorded_requests import RecordedSettings, shaping_options

if TYPE_CHECKING:
    from library.generation.gen_img.batches import Made

SCRIPT = "gen_img.py"
OF_MANY = frozenset({
    "n_iter", "images_per_prompt", "batch_size", "shuffle_prompts", "iter_same_seed", "from_module",
    "prompter_module_args", "sequential_file_name", "use_original_file_name",
})  # fmt: skip
"""options about several pictures and their names"""
RAW_PROMPT, PLACE = "raw_prompt", "place"
"""what is told beside options: the line before its choices were drawn; the place in a batch, on which last bits
depend"""
_FIELDS = {"width": "W", "height": "H", "steps": "steps", "cfg_scale": "scale", "seed": "seed", "sampler": "sampler"}
"""fields of requests of other scripts -> options"""


def recorded_of(config: Config, made: Made) -> RecordedSettings:
    """The settings that make a picture again. The small picture of highres fix (stage 0) is one without it."""
    request = made.request
    options = {name: value for name, value in shaping_options(config).items() if name not in OF_MANY}
    if made.stage == 0:
        options = {name: value for name, value in options.items() if not name.startswith("highres_fix_")}
    for changes in (_picture(config, request, options), _shrinking(request), _files(config, request)):
        options |= changes
    options["prompt"] = finished_line(request.prompt, request.negative_prompt)
    line: dict[str, Any] = {RAW_PROMPT: request.raw_prompt} if request.raw_prompt != options["prompt"] else {}
    if made.together > 1:
        options["batch_size"], line[PLACE] = made.together, made.place
    settings = RecordedSettings(SCRIPT, {name: value for name, value in options.items() if value is not None}, line)
    return settings.without_folders() if config[GenerationPictureOptions].metadata_file_names else settings


def _picture(config: Config, request: ImageRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seed": request.seed, "W": request.width, "H": request.height, "steps": request.steps, "scale": request.scale,
        "negative_scale": request.negative_scale,
    }  # fmt: skip
    if "highres_fix_scale" in options:
        found |= {"strength": request.strength, "highres_fix_strength": request.first_strength}
    elif config[GenerationSourceOptions].image_path:
        found["strength"] = request.strength
    if config[GenerationNetworkOptions].network_weights:
        found["network_mul"] = list(request.multipliers)
    if config[GenerationModelOptions].sdxl:
        names = ("original_height", "original_width", "crop_top", "crop_left")
        found |= dict(zip(names, request.sizes))
        found |= dict(zip(("original_height_negative", "original_width_negative"), request.sizes_negative))
    return found


def _shrinking(request: ImageRequest) -> dict[str, Any]:
    """Options of Deep Shrink and gradual latent; None of those that are off."""
    found: dict[str, Any] = dict.fromkeys(option_fields(GenerationShrinkOptions))
    match request.deep_shrink:
        case DeepShrinkSettings(depth_1, timesteps_1, depth_2, timesteps_2, ratio):
            found |= {"ds_depth_1": depth_1, "ds_timesteps_1": timesteps_1, "ds_depth_2": depth_2, "ds_ratio": ratio}
            found["ds_timesteps_2"] = timesteps_2
    match request.gradual_latent:
        case GradualLatentSettings(timesteps, ratio, ratio_step, every_n_steps, s_noise, unsharp):
            names = ("timesteps", "ratio", "ratio_step", "every_n_steps", "s_noise")
            values = (timesteps, ratio, ratio_step, every_n_steps, s_noise)
            found |= {f"gradual_latent_{name}": value for name, value in zip(names, values)}
            found["gradual_latent_unsharp_params"] = unsharp and ",".join(f"{part:g}" for part in unsharp)
    return found


def _files(config: Config, request: ImageRequest) -> dict[str, Any]:
    """The pictures whose turn it was."""
    from library.generation.gen_img.guides import picture_files

    sources, control, found = config[GenerationSourceOptions], config[GenerationControlOptions], {}
    if sources.image_path and request.source is not None:
        found["image_path"] = str(source_files(sources.image_path, "image_path")[request.source])
        if sources.mask_path:
            masks = source_files(sources.mask_path, "mask_path")
            found["mask_path"] = str(masks[request.source % len(masks)])
    guides = picture_files(control) if control.guides else []
    if len(guides) > 1 and request.guide is not None:
        count = len(control.guides)
        found["guide_image_path"] = [str(path) for path in guides[request.guide * count : (request.guide + 1) * count]]
    return found


# -- making one again --------------------------------------------------------------------------------------------------


def settings_of(path: str) -> RecordedSettings:
    """Of the file of --from_metadata. ConfigError."""
    return settings_of_file(path, SCRIPT, _as_options)


def _as_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {_FIELDS[name]: value for name, value in fields.items() if name in _FIELDS}
    return {**found, "prompt": finished_line(fields["prompt"], fields.get("negative_prompt") or "")}


def with_recorded(values: dict[str, Any]) -> dict[str, Any]:
    """Values of options with those of --from_metadata below them. ConfigError."""
    path = values.get("from_metadata")
    return option_values(settings_of(path), GENERATION_CLASSES, values, path) if path else values


def line_of(config: Config) -> Mapping[str, Any]:
    """What --from_metadata tells beside options, where it is of the prompt of the run."""
    path = config[GenerationPictureOptions].from_metadata
    settings = settings_of(path) if path else None
    same = settings is not None and settings.options.get("prompt") == config[GenerationPromptOptions].prompt
    return settings.line if settings is not None and same else {}


def raw_prompt(config: Config) -> str | None:
    """The line as it was written, before its choices were drawn."""
    return line_of(config).get(RAW_PROMPT)


def place_of(config: Config) -> int | None:
    """The place in a batch of --batch_size at which the picture is made again; None = alone."""
    place, size = line_of(config).get(PLACE), config[GenerationPromptOptions].batch_size
    return place if isinstance(place, int) and 0 <= place < size else None
