"""The image scripts of Stable Diffusion and SDXL: checks, the order of things, picture files. Models are in batches."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.atomic_file import unwritable_problem
from library.core.errors import AtelierError, CheckpointError, ConfigError, Problems, problems_of
from library.core.options import Config
from library.dataset.architectures import ARCHITECTURES
from library.families.registry import record_of
from library.generation import pipeline_class
from library.generation.gen_img.options import (
    GENERATION_CLASSES,
    GenerationControlOptions,
    GenerationModelOptions,
    GenerationNetworkOptions,
    GenerationPictureOptions,
    GenerationPromptOptions,
    GenerationSourceOptions,
)
from library.generation.gen_img.plan import Planner, PromptLine, batches, first_stage, round_of
from library.generation.gen_img.recorded import place_of, raw_prompt, recorded_of, with_recorded
from library.generation.gen_img.sources import (
    checked,
    lines_of_pictures,
    load_prompter,
    module_lines,
    open_picture,
    source_files,
    typed_lines,
    written_lines,
)
from library.generation.picture_files import write_picture
from library.generation.preview_options import PreviewOptions
from library.generation.recorded_requests import ENTRY
from library.generation.script import Failures, filled, format_problems, free_path
from library.scripts.command_line import read_command, refused_problems, run_to_exit, script_parser, tell_equivalent
from library.training.inference_samplers import sampler_notices
from library.training.option_groups import ConsoleOptions
from library.training.wiring.unet import about_slot, slot_problem

if TYPE_CHECKING:
    from library.generation.gen_img.batches import Made, PictureBatches
    from library.generation.gen_img.plan import ImageRequest

logger = logging.getLogger(__name__)

CLASSES = (*GENERATION_CLASSES, ConsoleOptions)
DEFAULT_SIZES = {"sd": 512, "sdxl": 1024}
KNOWN_ENDINGS = {"png", "webp", "jpg", "jpeg"}
"""of names in prompt lines, in the place of which the ending of --image_format stands"""
SDXL_ONLY = (
    "original_height",
    "original_width",
    "original_height_negative",
    "original_width_negative",
    "crop_top",
    "crop_left",
)


def build_parser(*, sdxl: bool = False) -> argparse.ArgumentParser:
    parser = script_parser(
        "Make images with SDXL" if sdxl else "Make images with Stable Diffusion 1, 2 and SDXL", CLASSES
    )
    if sdxl:
        parser.set_defaults(sdxl=True)
    return parser


def main(argv: Sequence[str] | None = None, *, sdxl: bool = False) -> None:
    """Read the options, load, make the pictures; ends the process with the exit code of an error and one message."""
    run_to_exit(lambda given: run(given, sdxl=sdxl), argv)


def run(argv: Sequence[str] | None = None, *, sdxl: bool = False) -> list[Path]:
    """`main` without the handling of errors; returns the files that were written."""
    told: list[str] = []
    config = read_command(
        argv, build_parser(sdxl=sdxl), CLASSES,
        complete=lambda values: filled(with_recorded(values), CLASSES, told),
    )  # fmt: skip
    problems = Problems()
    for problem in all_problems(config):
        problems.add(problem)
    lines = problems.attempt(lambda: known_lines(config))
    planner = problems.attempt(lambda: make_planner(config, lines or []))
    if planner is not None and lines:
        lines = problems.attempt(lambda: checked(lines, lambda line: check_line(planner, line, config)))
    problems.raise_if_any()
    tell_equivalent(config)
    from library.generation.speed import set_switches, speed_notices

    set_switches(config)
    for line in (*told, *start_notices(config), *speed_notices(config)):
        logger.info(line)
    from library.generation.attention import choose_attention
    from library.generation.gen_img.batches import load_batches
    from library.generation.prompt_weighting import warn_of_signed_mean

    warn_of_signed_mean(config[GenerationPromptOptions].emb_normalize_mode)
    maker = load_batches(config)
    choose_attention(maker.unet, config)
    add_pictures(maker, config)
    add_previews(maker, config)
    files, failures = PictureFiles(config), Failures()
    size, place = config[GenerationPromptOptions].batch_size, place_of(config)
    for requests in groups_of(config, planner, lines or [], maker, failures):
        for batch in batches(requests, size):
            started = time.perf_counter()
            if place is None:
                make_batch(maker, files, batch, failures)
            else:
                make_at_place(maker, files, batch[0], place, size, failures)
            logger.info("%d pictures in %.1f s", len(batch), time.perf_counter() - started)
    failures.raise_if_any(len(files.written))
    return files.written


def make_batch(maker: PictureBatches, files: PictureFiles, batch: Sequence[ImageRequest], failures: Failures) -> None:
    """Make and write pictures. Where they cannot be made together each is made alone, so that none is lost but those at
    fault."""
    if len(batch) == 1:
        with failures.told(f"picture {batch[0].number}"):
            for made in maker.generate(batch):
                files.write(made)
        return
    try:
        together = maker.generate(batch)
    except AtelierError as error:
        logger.warning("%d pictures cannot be made together (%s); each is made alone", len(batch), error)
        for request in batch:
            make_batch(maker, files, [request], failures)
        return
    for made in together:
        with failures.told(f"picture {made.request.number}"):
            files.write(made)


def make_at_place(
    maker: PictureBatches, files: PictureFiles, request: ImageRequest, place: int, size: int, failures: Failures
) -> None:
    """Make and write one picture at its place in a batch of copies: its last bits depend on both, not on the others."""
    with failures.told(f"picture {request.number}"):
        for made in maker.generate([request] * size):
            if made.place == place:
                files.write(made)


# -- checks ------------------------------------------------------------------------------------------------------------


def all_problems(config: Config) -> list[str]:
    """Everything that can be told without loading a model."""
    from library.generation.attention import attention_of
    from library.generation.gen_img.guides import guide_problems
    from library.generation.gen_img.networks import network_problems

    networks, sources = config[GenerationNetworkOptions], config[GenerationSourceOptions]
    model = config[GenerationModelOptions]
    model_found = model_problems(model)
    found = [*refused_problems(config), *model_found, *network_problems(networks, model.family)]
    found += guide_problems(
        config[GenerationControlOptions], model.family,
        lambda: None if model_found else pipeline_class(model.family).inspect(model)[0],
    )  # fmt: skip
    folder_problem = unwritable_problem("outdir", config[GenerationPictureOptions].outdir)
    found += [folder_problem] if folder_problem else []
    found += attention_of(config).problems
    if config[PreviewOptions].preview_latent_every:
        from library.generation.previews import preview_problems

        found += preview_problems(model.family, config[PreviewOptions].preview_vae)
    found += format_problems({"--fp16" if model.fp16 else "--bf16": model.dtype})
    found += word_problems(model, networks, has_model=not model_found)
    if config[GenerationPictureOptions].use_original_file_name and not sources.image_path:
        found.append("--use_original_file_name is given without --image_path; there are no names to use")
    is_regional = bool(sources.mask_path) and not sources.image_path
    if networks.network_regional_mask_max_color_codes is not None and not is_regional:
        found.append(
            "--network_regional_mask_max_color_codes is given; it needs --mask_path as regions, without --image_path"
        )
    if is_regional and networks.network_pre_calc and networks.network_weights:
        found.append(
            "--network_pre_calc adds networks to the weights, and regions of --mask_path need them apart; leave it out"
        )
    return found


def word_problems(model: GenerationModelOptions, networks: GenerationNetworkOptions, has_model: bool) -> list[str]:
    """What is wrong with files of textual inversions, and with words in files of networks; for the text encoders where
    there are such."""
    from library.generation.gen_img.networks import layered_words_of, words_of
    from library.generation.words import missing_files

    if not has_model:
        names = ("textual_inversion_embeddings", "XTI_embeddings")
        return [problem for name in names for problem in missing_files(getattr(networks, name) or (), name)]
    plain, layered = networks.textual_inversion_embeddings or (), networks.XTI_embeddings or ()
    twice = sorted({Path(path).stem for path in plain} & {Path(path).stem for path in layered})
    return [
        *problems_of(lambda: words_of(model, networks)), *problems_of(lambda: layered_words_of(model, networks)),
        *(
            f"--XTI_embeddings, --textual_inversion_embeddings: both give the word '{word}'; rename one"
            for word in twice
        ),
    ]


def model_problems(options: GenerationModelOptions) -> list[str]:
    """What is wrong with checkpoint, autoencoder and tokenizer, from headers."""
    family, kinds = pipeline_class(options.family), set(record_of(options.family).kinds)
    model_problem = slot_problem(options.ckpt, "ckpt", kinds, for_pictures=True)
    vae_problem = slot_problem(options.vae, "vae", {"vae_sd", *kinds}) if options.vae else None
    found = [problem for problem in (model_problem, vae_problem) if problem]
    if model_problem:
        return found
    checks = [lambda: family.inspect(options)[1], lambda: family.text_problems(options)]
    if not vae_problem:
        checks.append(
            lambda: _vae_problems(options.family, "vae" if options.vae else "ckpt", options.vae or options.ckpt)
        )
    for check in checks:
        try:
            found += check()
        except CheckpointError as error:
            found.append(about_slot("ckpt", options.ckpt, error))
    return found


def _vae_problems(family: str, slot: str, path: str) -> list[str]:
    channels, wanted = (
        pipeline_class(family).inspect_vae(path).params.z_channels,
        ARCHITECTURES[family].latents.channels,
    )
    return (
        []
        if channels == wanted
        else [f"--{slot} is {path}: its autoencoder has {channels} latent channels; {wanted} are needed"]
    )


def known_lines(config: Config) -> list[PromptLine]:
    """The prompts that are known at start: not those that are typed or that a module gives. ConfigError when there are
    none."""
    options, sources = config[GenerationPromptOptions], config[GenerationSourceOptions]
    lines = written_lines(options, raw_prompt(config))
    if lines or options.interactive:
        return lines
    if options.from_module:
        load_prompter(options.from_module)
        return []
    if sources.image_path:
        return lines_of_pictures(source_files(sources.image_path, "image_path"))
    raise ConfigError(
        "there is no prompt; give --prompt, --from_file, --interactive or --from_module, or --image_path with pictures "
        "that hold one"
    )


def make_planner(config: Config, lines: Sequence[PromptLine]) -> Planner:
    """ConfigError when pictures of --image_path or --mask_path cannot be read."""
    from library.generation.gen_img.guides import num_turns

    sources, prompts = config[GenerationSourceOptions], config[GenerationPromptOptions]
    sizes = []
    if sources.image_path:
        sizes = [
            open_picture(file, "RGB", "image_path").size for file in source_files(sources.image_path, "image_path")
        ]
    if sources.mask_path:
        for file in source_files(sources.mask_path, "mask_path"):
            open_picture(file, "L", "mask_path")
    is_alone = len(lines) == 1 and prompts.n_iter == prompts.images_per_prompt == 1
    default = DEFAULT_SIZES[config[GenerationModelOptions].family]
    return Planner(
        config, default_size=default, source_sizes=sizes, guide_turns=num_turns(config[GenerationControlOptions]),
        is_alone=is_alone,
    )


def check_line(planner: Planner, line: PromptLine, config: Config) -> None:
    """ConfigError for a line that cannot be made with these options."""
    sources = config[GenerationSourceOptions]
    for request in planner.check(line):
        _check_depths(request, line, config[GenerationModelOptions])
        if request.deep_shrink is not None and config[GenerationControlOptions].control_net_lllite_models:
            raise ConfigError(
                f"{line.where}: Deep Shrink makes the features smaller that --control_net_lllite_models changes by the"
                " places of a picture; leave one of them out"
            )
        if sources.highres_fix_scale is not None:
            first_stage(request, sources.highres_fix_scale, sources.highres_fix_steps)
        if request.gradual_latent is not None and sources.mask_path and sources.image_path:
            raise ConfigError(
                f"{line.where}: gradual latent changes the size of latents, which a mask of --mask_path does not "
                "follow; leave one out"
            )


def _check_depths(request: ImageRequest, line: PromptLine, model: GenerationModelOptions) -> None:
    """ConfigError for a block of Deep Shrink that the U-Net has not, which would have no effect."""
    depths = [] if request.deep_shrink is None else [request.deep_shrink.depth_1, request.deep_shrink.depth_2]
    blocks = _blocks_down(model) if depths else None
    wrong = next((depth for depth in depths if depth is not None and blocks is not None and depth >= blocks), None)
    if wrong is not None:
        raise ConfigError(
            f"{line.where}: Deep Shrink is for block {wrong}; the U-Net of {model.ckpt} has {blocks} on the way down, "
            f"so 0 to {blocks - 1} is needed"
        )


@lru_cache(maxsize=1)
def _blocks_down(model: GenerationModelOptions) -> int | None:
    """Blocks of the U-Net on the way down, from the header; None for a checkpoint that does not fit, which is told
    elsewhere."""
    try:
        params = pipeline_class(model.family).inspect(model)[0].params
    except CheckpointError:
        return None
    return len(params.channels) * (params.num_res_blocks + 1)


def start_notices(config: Config) -> list[str]:
    """Where pictures differ from those of other scripts with the same options, one line each."""
    pictures, sources = config[GenerationPictureOptions], config[GenerationSourceOptions]
    lines = [
        "noise is drawn on the CPU in float32: a seed means the same picture on every device, and another one than in "
        "scripts that draw elsewhere"
    ]
    lines += [*sampler_notices(pictures.sampler), *config[PreviewOptions].notices(), *pictures.idle_file_options(config.explicit)]
    if sources.image_path and sources.mask_path:
        lines.append(
            "inpainting: the kept part has the noise of each step's end and none at the end, where other scripts leave "
            "some in it"
        )
    if sources.strength is not None and not sources.image_path and sources.highres_fix_scale is None:
        lines.append("--strength has no effect: there is neither --image_path nor --highres_fix_scale")
    sizes = [name for name in SDXL_ONLY if getattr(pictures, name) is not None]
    if sizes and not config[GenerationModelOptions].sdxl:
        lines.append(
            f"{', '.join(f'--{name}' for name in sizes)}: sizes mean nothing to Stable Diffusion 1 and 2; no effect"
        )
    if len(config[GenerationControlOptions].guides) > 1:
        lines.append(
            "several ControlNets and LLLites: all of them work in each step of their --control_net_ratios, and what"
            " they add is summed"
        )
    if config[GenerationModelOptions].sdxl and pictures.negative_scale is not None:
        lines.append("--negative_scale: three branches (negative, positive, empty prompt), for SDXL too")
    return lines


# -- the run -----------------------------------------------------------------------------------------------------------


def groups_of(
    config: Config, planner: Planner, lines: list[PromptLine], maker: PictureBatches, failures: Failures
) -> Iterator[Iterator[ImageRequest]]:
    """The pictures of the run in order: of all rounds or, with --interactive, of each line as it is typed."""

    def check(line: PromptLine) -> None:
        check_line(planner, line, config)

    def requests_of(line: PromptLine, number: int) -> Iterator[ImageRequest]:
        """A line is checked with one draw of its choices; another draw may be wrong."""
        for index in range(config[GenerationPromptOptions].images_per_prompt):
            with failures.told(line.where):
                yield from planner.requests_at(line, number, index)

    options = config[GenerationPromptOptions]
    if options.interactive:
        for line in typed_lines(check):
            yield requests_of(line, 0)
        return
    prompter: Any = None
    if options.from_module:
        prompter = load_prompter(options.from_module)(
            argparse.Namespace(**config.values()), maker, maker.networks.networks
        )

    def lines_of(number: int) -> list[PromptLine]:
        known = lines if prompter is None else _of_module(list(module_lines(prompter)), check)
        return round_of(known, options, planner.base_seed, number)

    yield (
        request
        for number in range(options.n_iter)
        for line in lines_of(number)
        for request in requests_of(line, number)
    )


def _of_module(lines: list[PromptLine], check: Callable[[PromptLine], None]) -> list[PromptLine]:
    """As `checked`; a round without a good line makes nothing."""
    try:
        return checked(lines, check)
    except ConfigError as error:
        logger.error("no prompt of this round can be made: %s", error)
        return []


def add_pictures(maker: PictureBatches, config: Config) -> None:
    """Source pictures with their masks, or the regions of a mask."""
    from library.generation.gen_img.batches import read_regions

    sources = config[GenerationSourceOptions]
    if sources.image_path:
        maker.sources = [
            open_picture(file, "RGB", "image_path") for file in source_files(sources.image_path, "image_path")
        ]
    if sources.mask_path and sources.image_path:
        maker.masks = [open_picture(file, "L", "mask_path") for file in source_files(sources.mask_path, "mask_path")]
    elif sources.mask_path:
        image = open_picture(source_files(sources.mask_path, "mask_path")[0], "RGB", "mask_path")
        maker.regions = read_regions(image, config[GenerationNetworkOptions].network_regional_mask_max_color_codes)


def add_previews(maker: PictureBatches, config: Config) -> None:
    """The steps of the first picture of a batch write previews, where that is asked for."""
    options = config[PreviewOptions]
    if options.preview_latent_every:
        from library.generation.previews import previews_of

        folder, family = Path(config[GenerationPictureOptions].outdir), config[GenerationModelOptions].family
        every, fps = options.preview_latent_every, 1  # of clips, which these are not
        maker.pipeline.observe = previews_of(family, folder, every, options.preview_vae, fps)


# -- files -------------------------------------------------------------------------------------------------------------


class PictureFiles:
    """Names and writes the pictures of a run."""

    def __init__(self, config: Config) -> None:
        self.config, self.options = config, config[GenerationPictureOptions]
        self.sampler = self.options.sampler
        self.is_sdxl = config[GenerationModelOptions].sdxl
        path = config[GenerationSourceOptions].image_path
        self.sources = source_files(path, "image_path") if path else []
        self.written: list[Path] = []
        self._taken: set[Path] = set()

    def write(self, made: Made) -> Path:
        path = self.path_of(made)
        texts = {} if self.options.no_metadata else self._texts(made)
        write_picture(made.image, path, texts, self.options.image_quality)
        logger.info("%s: %dx%d, %d steps, seed %d", path, *made.image.size, made.request.steps, made.request.seed)
        self.written.append(path)
        return path

    def _texts(self, made: Made) -> dict[str, str]:
        settings = recorded_of(self.config, made)
        return {**picture_texts(made.request, self.sampler, self.is_sdxl), ENTRY: settings.text}

    def path_of(self, made: Made) -> Path:
        """`im_{YYYYmmddHHMMSS}_{stage}{number}_{seed}.png`, with a number where another call of the same second has
        made it; or as --f, --use_original_file_name, --sequential_file_name say, over what an earlier call made."""
        folder, name = Path(self.options.outdir), self._asked_name(made)
        if name is not None:
            return self._free(folder / name)
        stage = "" if made.stage is None else str(made.stage)
        number, seed = made.request.number, made.request.seed
        name = f"im_{time.strftime('%Y%m%d%H%M%S')}_{stage}{number:03d}_{seed}"
        return free_path(folder, name, self.options.picture_ending)

    def _asked_name(self, made: Made) -> str | None:
        request, stage = made.request, "" if made.stage is None else str(made.stage)
        ending = f"{'_1st' if made.stage == 0 else ''}{self.options.picture_ending}"
        if request.file_name is not None:
            stem, dot, given = request.file_name.rpartition(".")
            stem = stem if dot and given.lower() in KNOWN_ENDINGS else request.file_name
            return f"{stem}{ending}"
        if self.options.use_original_file_name and request.source is not None:
            return f"{self.sources[request.source].stem}{ending}"
        if self.options.sequential_file_name:
            return f"im_{stage}{request.number + 1:06d}{self.options.picture_ending}"
        return None

    def _free(self, path: Path) -> Path:
        """The path, or one with a number where this run has written it already."""
        found, number = path, 1
        while found in self._taken:
            found = path.with_name(f"{path.stem}_{number:03d}{path.suffix}")
            number += 1
        self._taken.add(found)
        return found


def picture_texts(request: ImageRequest, sampler: str, is_sdxl: bool) -> dict[str, str]:
    """Text entries of a picture file, under the names that other programs know."""
    entries: dict[str, Any] = {
        "prompt": request.prompt, "seed": request.seed, "sampler": sampler, "steps": request.steps,
        "scale": request.scale,
        "negative-prompt": request.negative_prompt or None, "negative-scale": request.negative_scale,
        "raw-prompt": request.raw_prompt if request.raw_prompt != request.prompt else None,
    }  # fmt: skip
    if is_sdxl:
        height, width, top, left = request.sizes
        entries |= {"original-height": height, "original-width": width, "crop-top": top, "crop-left": left}
        entries |= {
            "original-height-negative": request.sizes_negative[0],
            "original-width-negative": request.sizes_negative[1],
        }
    return {name: str(value) for name, value in entries.items() if value is not None}
