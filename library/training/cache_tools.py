"""The tools that fill the caches of a data set: their options, and the run. They share the trainer's own code path."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.garbage import started, wait_until_started
from library.core.options import Config, equivalent_option, option, option_fields, refused_option
from library.core.registry import import_target
from library.dataset import CachingOptions, DatasetOptions
from library.families.registry import FAMILIES, record_of
from library.training import clip_cache_options, option_reader, packing_options, parser_common
from library.training.clip_cache_options import ClipCacheOptions, ClipLatentsOptions
from library.training.computing_options import DdpOptions, PrecisionOptions
from library.training.config_file import read_config_file
from library.training.idle_options import as_block
from library.training.option_groups import ConfigFileOptions, ConsoleOptions, LoopOptions, ModelOptions
from library.training.packing_options import NavitOptions

if TYPE_CHECKING:
    from library.dataset.items import ImageItem
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger("atelier")

PARTS = {"latents": "vae", "text": "text_encoders"}
"""what is cached -> the part of the model that makes it"""
FIRST_FAMILY = next(iter(FAMILIES))
"""whose options --help shows when no family is named"""
_OTHER = {"latents": "cache_text_encoder_outputs", "text": "cache_latents"}
_TRAINING = "it belongs to training; this tool only fills caches"
_DENOISER = "it belongs to the denoiser, which this tool does not load"


@dataclass(frozen=True, kw_only=True)
class CacheToolOptions:
    """Which caches"""

    family: str | None = option(
        None, help="model family; may be left out where another option tells it, e.g. --ae", metavar="NAME"
    )
    skip_existing: bool = equivalent_option(
        False, help="deprecated", reason="--skip_existing: cache files that are valid are never made again anyway"
    )


@dataclass(frozen=True, kw_only=True)
class T5FormatOptions:
    """Format of T5"""

    t5xxl_dtype: str | None = refused_option(
        None, help="number format of T5", reason="all text encoders run in the format of --mixed_precision"
    )


def family_switches() -> type:
    """An option group with a switch for every family: `--NAME` is `--family NAME`."""
    return _switches_of(tuple(FAMILIES))


@functools.cache
def _switches_of(families: tuple[str, ...]) -> type:
    switches = {name: option(False, help=f"the same as --family {name}") for name in families}
    group = dataclasses.make_dataclass(
        "FamilySwitches", [(name, bool, switch) for name, switch in switches.items()], frozen=True, kw_only=True
    )
    group.__doc__ = "Model family"
    return group


def refusals(family: type[ModelFamily], what: str) -> dict[str, str]:
    """Options of the groups below that have no meaning for a tool, with the reason."""
    names = {
        _TRAINING: (
            "max_train_steps",
            "max_train_epochs",
            "persistent_data_loader_workers",
            "gradient_accumulation_steps",
            "full_fp16",
            "full_bf16",
            "prior_loss_weight",
            "debug_dataset",
            "output_config",
            "navit_max_images_per_pack",
            "navit_pack_strategy",
            "navit_pack_ffd_window",
            "navit_drop_last",
            "navit_text_trim_padding",
        ),
        _DENOISER: (
            "fp8_base_unet",
            "fp8_scaled",
            "fp8_fast",
            "mixed_precision_transformer",
            "fp16_accumulation",
            "quantize_base",
            *(set(option_fields(family.options)) - set().union(*family.part_options.values())),
        ),
        "a dataset class brings its own tensors, which are not cached": ("dataset_class",),
    }
    if what == "latents":
        names["the VAE is not held in fewer bits"] = ("fp8_base", "quantize_text_encoder")
    reasons = {name: reason for reason, group in names.items() for name in group}
    return {**family.refused, **reasons}


def tool_script(family: str, what: str) -> option_reader.Script:
    """The options of the tool that caches `what` ("latents" or "text") for a family."""
    family_class = import_target(record_of(family).family)
    defaults = (
        {"cache_latents": True, "cache_latents_to_disk": True}
        if what == "latents"
        else {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    )
    more, spelled = clip_cache_options.OPTIONS[what], clip_cache_options.STANDS_FOR[what]
    if record_of(family).clips is None:  # tools of families that learn from pictures alone have none of these
        more, spelled = (), {}
    return option_reader.Script(
        family,
        f"cache of {what}",
        classes=(
            CacheToolOptions,
            *more,
            # of families without an option of this name in their own scripts
            *(() if "t5xxl_dtype" in option_fields(family_class.options) else (T5FormatOptions,)),
            family_switches(),
            ConfigFileOptions,
            ModelOptions,
            family_class.options,
            DatasetOptions,
            CachingOptions,
            LoopOptions,
            *((NavitOptions,) if what == "latents" and family_class.packs() else ()),
            PrecisionOptions,
            DdpOptions,
            ConsoleOptions,
        ),
        refused=refusals(family_class, what),
        ignored=family_class.ignored,
        foreign=family_class.foreign,
        neutral=family_class.neutral,
        defaults={**family_class.defaults, **defaults, **family_class.tool_defaults.get(what, {})},
        stands_for={**family_class.stands_for, **spelled},
        shares_file=True,
    )


def chosen_family(argv: Sequence[str], default: str | None = None) -> str:
    """The family that the command line names, or the one whose own options it or its configuration file has, else
    `default`. Raises ConfigError for an unknown one, and when several are possible."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--family")
    reader.add_argument("--config_file")
    for name in FAMILIES:
        reader.add_argument(f"--{name}", action="store_true")
    words = [word for word in argv if word != "--"]
    given, _ = reader.parse_known_args(words)
    named = {name for name in FAMILIES if getattr(given, name)} | ({given.family} if given.family else set())
    named = named or _families_with(_names_used(words, given.config_file))
    if not named and (default or len(FAMILIES) == 1):
        named = {default or next(iter(FAMILIES))}
    if len(named) != 1:
        several = f"several model families are named ({', '.join(sorted(named))})"
        raise ConfigError(
            f"{several if named else 'no model family is named'}; needed: --family with one of {', '.join(FAMILIES)}"
        )
    name = named.pop()
    record_of(name)  # complains about an unknown name
    return parser_common.chosen_variant(name, words)


def _names_used(words: Sequence[str], config_file: str | None) -> set[str]:
    """Names of options on the command line and in the configuration file, as far as that can be read."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    try:
        return names | set(read_config_file(config_file)) if config_file else names
    except ConfigError:
        return names  # complained about when it is read in earnest


def _families_with(names: set[str]) -> set[str]:
    """Families that have all of these options that are some family's own; those with one of them, when none has
    all."""
    own = {
        name: set(option_fields(import_target(entry.family).options))
        for name, entry in FAMILIES.items()
        if entry.variant_of is None  # an option chooses it in the place of its family
    }
    used = names & set().union(*own.values())
    return {name for name, options in own.items() if used and used <= options} or {
        name for name, options in own.items() if used & options
    }


def build_parser(what: str, family: str = FIRST_FAMILY) -> argparse.ArgumentParser:
    """The parser of a tool with the options of one family."""
    script = tool_script(family, what)
    parser = option_reader.parser_of(script)
    parser.description = (
        f"Fill the {'latent' if what == 'latents' else 'text encoder output'} cache of a data set. Options of the "
        f"family {family};"
        f" families: {', '.join(FAMILIES)}."
    )
    return parser


def main(what: str, argv: Sequence[str] | None = None, family: str | None = None) -> None:
    """Read the options, fill the cache, end the process with an error's exit code and one message. `family`: that of a
    script which has only one."""
    from library.training.cli import exit_code

    if argv is None:
        wait_until_started()
    words = list(sys.argv[1:] if argv is None else argv)
    if family is not None:
        words = [f"--family={family}", *words]

    def show_help_or_run() -> None:
        if {"-h", "--help"} & set(words):
            build_parser(what, chosen_family(words, default=FIRST_FAMILY)).print_help()
        else:
            run(what, words)

    code = exit_code(show_help_or_run, "interrupted; what is finished stays, and the next run goes on from there")
    if code:
        sys.exit(code)


def run(what: str, argv: Sequence[str]) -> None:
    """`main` without the handling of errors."""
    from library.training.cli import set_up_logging

    name = chosen_family(argv)
    parsed = parser_common.parse_script(argv, tool_script(name, what))
    config = only_this_cache(parsed.config, what)
    set_up_logging(config[ConsoleOptions])
    for note in parsed.notes:
        logger.log(note.level, note.text)
    ignored = [*config.ignored, *clip_cache_options.idle(config), *packing_options.idle_sizes(config)]
    if ignored and config[ConfigFileOptions].strict:
        raise ConfigError([f"{item} (--strict is set)" for item in ignored])
    if ignored:
        logger.warning("%s", as_block(ignored))
    family = import_target(record_of(name).family)(config)
    _name_unused(family, config, what)
    data, runtime = _data(config, family, what)
    started()
    looks = config[ClipLatentsOptions] if ClipLatentsOptions in config.classes() else None
    if looks is not None and looks.debug_mode is not None:
        from library.training.cache_preview import preview

        logger.info("%d samples shown; nothing was encoded", preview(looks, data, family.architecture))
    else:
        with _cudnn_of(looks):
            fill(what, config, family, data, runtime)
    runtime.leave_group()


def only_this_cache(config: Config, what: str) -> Config:
    """The same options with this tool's cache on disk and the other off, whose rules play no part."""
    caching = config[CachingOptions]
    option_name = "cache_latents_to_disk" if what == "latents" else "cache_text_encoder_outputs_to_disk"
    if not getattr(caching, option_name):
        raise ConfigError(f"--{option_name} is false; this tool does nothing but write these files")
    off = (_OTHER[what], f"{_OTHER[what]}_to_disk")
    groups = {options_class: config[options_class] for options_class in config.classes()}
    groups[CachingOptions] = dataclasses.replace(caching, **{name: False for name in off})
    return Config(groups, config.explicit, config.ignored)


def _name_unused(family: ModelFamily, config: Config, what: str) -> None:
    """Files of parts that are not loaded may be named, so that one set of options serves training and both tools."""
    needed = family.part_options[PARTS[what]]
    others = set().union(*family.part_options.values()) - needed
    unused = sorted(others & config.explicit)
    if unused:
        logger.info("not needed for this cache: %s", ", ".join(f"--{name}" for name in unused))


def _data(config: Config, family: ModelFamily, what: str) -> tuple[DataGroups, Runtime]:
    """The images, after every problem of model files, configuration and image files was looked for."""
    from library.device_utils import device_problem
    from library.training.accelerator_setup import prepare_runtime
    from library.training.data_phase import find_data, group_data, side_limit_of

    problems, found = Problems(), None
    clips = config[ClipCacheOptions] if ClipCacheOptions in config.classes() else ClipCacheOptions()
    try:
        found = find_data(config, family.architecture, limit=side_limit_of(family))
    except ConfigError as error:
        problems.absorb(error)
    if found is not None and found.scan is not None:
        family.see_items([item for items in (*found.scan.train, *found.scan.validation) for item in items])
    if not _only_shows(config):
        for message in family.part_problems(PARTS[what]):
            problems.add(message)
    if problem := device_problem("device", clips.device):
        problems.add(problem)
    problems.raise_if_any()
    runtime = _on_device(prepare_runtime(config), clips.device)
    return group_data(config, found, family.architecture, runtime.seed), runtime


def _only_shows(config: Config) -> bool:
    return ClipLatentsOptions in config.classes() and config[ClipLatentsOptions].debug_mode is not None


def _cudnn_of(options: ClipLatentsOptions | None) -> AbstractContextManager[None]:
    """--disable_cudnn_backend."""
    import torch

    is_off = options is not None and options.disable_cudnn_backend
    return torch.backends.cudnn.flags(enabled=False) if is_off else nullcontext()


def _on_device(runtime: Runtime, device: str | None) -> Runtime:
    """The runtime with the device of --device. ConfigError with several processes, which have one each."""
    import torch

    if device is None:
        return runtime
    if runtime.num_processes > 1:
        raise ConfigError(
            f"--device is {device}, with {runtime.num_processes} processes, which have one device each; leave it out,"
            " or start one process"
        )
    return dataclasses.replace(runtime, device=torch.device(device))


def fill(what: str, config: Config, family: ModelFamily, data: DataGroups, runtime: Runtime) -> None:
    """Encode what is missing, in training and validation images."""
    from library.dataset.strategies import StrategySet
    from library.training.data_phase import cache_latents, prepare_text

    if what == "latents":
        strategies = StrategySet(None, None, family.latents_caching(), None)
        cache_latents(
            config,
            data,
            strategies,
            runtime,
            lambda: family.load_vae(runtime).requires_grad_(False).eval(),
            lambda: {
                name: part.requires_grad_(False).eval() for name, part in family.load_parts(runtime, "vae").items()
            },
            num_threads=config[ClipLatentsOptions].num_workers if ClipLatentsOptions in config.classes() else None,
        )
    else:
        strategies = family.strategies()
        prepare_text(
            data, strategies, runtime, encode_prompts=None,
            load=lambda: [encoder.requires_grad_(False).eval() for encoder in family.load_text_encoders(runtime)],
        )
    items = [item for group in data.groups for item in group.items]
    logger.info("the cache of %d %s is complete", len(items), "images" if family.record.clips is None else "samples")
    if ClipCacheOptions in config.classes() and not config[ClipCacheOptions].keep_cache and runtime.is_main_process:
        _prune(what, items, family)


def _prune(what: str, items: Sequence[ImageItem], family: ModelFamily) -> None:
    """Remove what the data set made of videos and clips that it no longer has."""
    from library.dataset.cache_pruning import prune

    architecture = family.architecture
    if what == "latents":
        prune(items, lambda item: item.latents_npz, architecture.latents_suffix, architecture)
    elif architecture.text_suffix is not None:
        prune(items, lambda item: item.text_encoder_outputs_npz, architecture.text_suffix, architecture)

