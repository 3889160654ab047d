"""From a command line to a Config: the option groups of a script, its parser, the merging of --config_file.

    command line  beats  --config_file  beats  the family's default  beats  the option's default

Nothing heavy is imported here: groups are named as texts and their packages hold options alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError
from library.core.options import Config, option_fields
from library.core.plugins import PluginOptions, import_plugins
from library.core.registry import Registry, import_target
from library.families.registry import record_of, variants_of
from library.training.config_file import convert_value, read_config_file
from library.training.option_groups import SHARED_GROUPS, ConfigFileOptions, HookOptions
from library.training.option_reader import Note, OptionReader, Script, parser_of

if TYPE_CHECKING:
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)

PACKAGE_GROUPS: tuple[str, ...] = (
    "library.dataset:DatasetOptions",
    "library.dataset:CachingOptions",
    "library.training.optimizers:OptimizerOptions",
    "library.training.schedulers:SchedulerOptions",
    "library.training.losses:LossOptions",
    "library.training.loss_weights:LossWeightOptions",
    "library.training.timestep_samplers:TimestepOptions",
    "library.training.timestep_samplers.info_noise_options:InfoNoiseOptions",
    "library.training.alignment:SelfFlowOptions",
    "library.training.alignment:SraOptions",
    "library.training.alignment:LeapOptions",
    "library.training.packing_options:NavitOptions",
    "library.training.inference_samplers:SamplerOptions",
)
PATH_OPTIONS: tuple[str, ...] = (
    "pretrained_model_name_or_path",
    "vae",
    "tokenizer_cache_dir",
    "train_data_dir",
    "conditioning_data_dir",
    "reg_data_dir",
    "output_dir",
    "logging_dir",
)
"""never recorded with the curves, and named in the log when W&B would record the command line"""


NEW_WORDS_LEARN = "the text encoders read the vectors that learn in every step, so that their outputs are new each time"

CONTROL_IS_NO_MASK = (
    "the conditioning images are what the net sees; masks are the alpha channels of the images, with alpha_mask = true"
    " in the dataset"
)

OF_ONE_TYPE = {
    "mixed_precision_transformer": "the net that learns begins as a copy of layers of the denoiser, whose weights are of"
    " one type for it"
}

TRAINABLES: Registry[type] = Registry(
    "trainable",
    group="trainables",
    takes=("config",),
    info={
        "options": None, "beside": None, "ignored": None, "refused": None, "foreign": None, "defaults": None,
        "stands_for": None, "following": None,
    },
    wanted="a subclass of library.training.trainables.base.Trainable whose options are a dataclass",
    is_a=lambda found: (
        isinstance(found, type) and all(hasattr(found, name) for name in ("options", "attach", "param_groups", "save"))
    ),
)
"""What is learned, by the name that a script gives. `options`: its group, importable without torch; `ignored`: shared
options without meaning for this kind of training, name -> reason, or a function as `foreign` is; `refused`: those
without which the result would be another, or such a function; `foreign`: a function of the family's record and the
name that tells which options of the group the family's script lacks; `beside`: a function of the record that gives
further groups; `defaults`: of shared options, where they differ; `stands_for`: as ModelFamily has it; `following`: a
function of the family's class and the values given, for defaults that follow from these. One from outside says the
first two in its class."""
TRAINABLES.add(
    "network",
    "library.training.trainables.network_words:NetworkWithWords",
    options="library.training.adapters:NetworkOptions",
    beside="library.training.new_words:groups_beside_adapter",
    foreign="library.training.adapters:foreign_options",
    ignored="library.training.adapters:ignored_options",
)

OFFLOADS = {"cpu_offload_checkpointing": {"gradient_checkpointing": True}}
"""as the known scripts that train something else than an adapter read it"""
for _name, _class in (("full", "FullTrainable"), ("dreambooth", "DreamBooth")):
    TRAINABLES.add(
        _name,
        f"library.training.trainables.full:{_class}",
        options="library.training.whole_models:WholeModelOptions",
        foreign="library.training.whole_models:foreign_options",
        ignored="library.training.whole_models:ignored_options",
        defaults={"save_model_as": None},
        following="library.training.whole_models:following_defaults",
        refused="library.training.whole_models:refused_options",
        stands_for={
            "use_t5xxl_cache_only": {"cache_text_encoder_outputs": True},
            **OFFLOADS,
        },
    )

for _name, _class in (("textual_inversion", "TextualInversion"), ("textual_inversion_xti", "LayeredTextualInversion")):
    TRAINABLES.add(
        _name,
        f"library.training.trainables.textual_inversion:{_class}",
        options="library.training.new_words:TextualInversionOptions",
        foreign="library.training.new_words:foreign_options",
        defaults={"save_model_as": "pt"},
        refused={
            "cache_text_encoder_outputs": NEW_WORDS_LEARN,
            "cache_text_encoder_outputs_to_disk": NEW_WORDS_LEARN,
            "fused_backward_pass": "a few vectors learn, whose gradients take no memory that it could save",
        },
    )

TRAINABLES.add(
    "control_net",
    "library.training.trainables.control_net:ControlNetTrainable",
    options="library.training.control_nets:ControlNetOptions",
    foreign="library.training.control_nets:foreign_options",
    ignored="library.training.control_nets:ignored_options",
    refused={"masked_loss": CONTROL_IS_NO_MASK, **OF_ONE_TYPE},
    stands_for=OFFLOADS,
)

TRAINABLES.add(
    "lllite",
    "library.training.trainables.lllite:LLLiteTrainable",
    options="library.training.lllite:LLLiteOptions",
    foreign="library.training.lllite:foreign_options",
    refused={
        "masked_loss": CONTROL_IS_NO_MASK,
        "fused_backward_pass": "a small network learns, whose gradients take no memory that it could save",
    },
)


def trainable_options(name: str) -> tuple[type, Mapping[str, Any]]:
    """(the group of options of a trainable, what the registry says of it)."""
    entry = TRAINABLES.entry(name)
    if entry.info["options"]:
        return import_target(entry.info["options"]), entry.info
    found = TRAINABLES.resolve(name)
    return found.options, {**entry.info, "ignored": found.ignored}


@dataclass(frozen=True)
class Parsed:
    config: Config
    notes: tuple[Note, ...]


def import_named_plugins(argv: Sequence[str] | None) -> None:
    """The modules of --plugins, on the command line or in its configuration file, before names are looked up: they may
    register variants, and values of options that only names from outside can have. What is wrong with them is told when
    the options are read."""
    value = early_values(argv, ()).get("plugins")
    try:
        import_plugins(convert_value(PluginOptions, "plugins", value) or () if value else ())
    except (ConfigError, ValueError):
        return


def early_values(argv: Sequence[str] | None, names: Iterable[str]) -> dict[str, Any]:
    """What the command line, or else its configuration file, says of --plugins and of these options; nothing where one
    of them cannot be read."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config_file", "plugins", *names):
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        reader.add_argument(*flags, dest=name, nargs="*" if name == "plugins" else None)
    try:
        given = vars(reader.parse_known_args(sys.argv[1:] if argv is None else list(argv))[0])
        in_file = read_config_file(given["config_file"]) if given["config_file"] else {}
    except (argparse.ArgumentError, ConfigError):
        return {}
    return {
        **{key.replace("-", "_"): value for key, value in in_file.items()},
        **{key: value for key, value in given.items() if value is not None},
    }


def chosen_variant(family: str, argv: Sequence[str] | None) -> str:
    """The family itself, or the variant that an option on the command line or in its configuration file chooses instead
    (`FamilyRecord.variant_of`). Whatever is wrong with the options is told when they are read with those of the
    family."""
    import_named_plugins(argv)
    variants = variants_of(family)
    if not variants:
        return family
    values = early_values(argv, dict.fromkeys(record.variant_of[1] for record in variants if record.variant_of))
    for record in variants:
        _, name, value = record.variant_of
        if values.get(name) == value:
            return record.name
    return family


def script(family: str, trainable: str) -> Script:
    """The options of the script that trains `trainable` of `family`."""
    record = record_of(family)
    own = record.scripts.get(trainable)
    family_class = import_target(record.family)
    options, said = trainable_options(trainable)
    foreign = import_target(said["foreign"])(record, trainable) if said["foreign"] else {}
    ignored, refused = (
        import_target(table)(record, trainable) if isinstance(table, str) else table or {}
        for table in (said["ignored"], said["refused"])
    )
    beside = import_target(said["beside"])(record) if said["beside"] else ()
    packages = tuple(import_target(target) for target in PACKAGE_GROUPS)
    first, rest = SHARED_GROUPS[:3], SHARED_GROUPS[3:]
    own_names = option_fields(options).keys()
    further = (group for group in family_class.further_options if not option_fields(group).keys() & own_names)
    return Script(
        family,
        trainable,
        classes=(*first, family_class.options, *further, options, *beside, *packages, *rest),
        refused={**family_class.refused, **refused},
        defaults={**family_class.defaults, **(said["defaults"] or {}), **(own.defaults if own else {})},
        ignored={**family_class.ignored, **ignored},
        foreign={**family_class.foreign, **foreign},
        read_values=family_class.read_values,
        idle_values=family_class.idle_values,
        neutral=family_class.neutral,
        stands_for={**family_class.stands_for, **(said["stands_for"] or {})},
        following=functools.partial(_following, family_class, said["following"]),
    )


def _following(family_class: type[ModelFamily], target: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the values for the family, and for what is trained, by its own function."""
    own = import_target(target)(family_class, values) if target else {}
    return {**family_class.following_defaults(values), **own}


def build_parser(family: str, trainable: str, strict: bool = False) -> argparse.ArgumentParser:
    """A parser of every option of a script. Options that are not given are absent from its namespace."""
    return parser_of(script(family, trainable), strict)


def parse(argv: Sequence[str] | None, family: str, trainable: str) -> Config:
    """Read the command line and the configuration file; raises one ConfigError with every problem."""
    parsed = parse_command(argv, family, trainable)
    for note in parsed.notes:
        logger.log(note.level, note.text)
    return parsed.config


def parse_command(argv: Sequence[str] | None, family: str, trainable: str) -> Parsed:
    """Like `parse`, with the log lines handed back: the log is set up from the options themselves."""
    argv = sys.argv[1:] if argv is None else argv
    import_named_plugins(argv)
    return parse_script(argv, with_own_hooks(script(family, trainable), argv))


def with_own_hooks(what: Script, argv: Sequence[str]) -> Script:
    """The script with the options of the hooks that the command line or its configuration file name."""
    reader = OptionReader(Script(what.family, what.trainable, (ConfigFileOptions, HookOptions), {}, {}))
    try:
        written = reader.command_line([word for word in argv if word not in ("-h", "--help")])
        in_file = reader.file(written["config_file"], written) if written.get("config_file") else {}
        names = reader.converted({**in_file, **written}, "--{name}").get("hook")
    except ConfigError:
        names = None  # what is wrong is told when all options are read
    if not names:
        return what
    from library.training.own_hooks import option_groups_of

    return dataclasses.replace(what, classes=(*what.classes, *option_groups_of(names, what.owners)))


def parse_script(argv: Sequence[str] | None, what: Script) -> Parsed:
    """The same for a Script that was put together elsewhere."""
    reader = OptionReader(what)
    written = reader.command_line(sys.argv[1:] if argv is None else argv)
    on_line = reader.converted(reader.with_meaning(written), "--{name}")
    in_file: dict[str, Any] = {}
    if on_line.get("config_file") and not on_line.get("output_config"):
        in_file = reader.file(on_line["config_file"], written)
    config = reader.config(reader.without_refused({**in_file, **on_line}))
    return Parsed(config, (*reader.notes, *_privacy_notes(what, config, on_line)))


def shown_paths(values: Mapping[str, Any]) -> list[str]:
    """Names of options whose values tell where on this machine something lies."""
    texts = {name: str(values.get(name) or "") for name in PATH_OPTIONS}
    return [name for name, text in texts.items() if text.startswith(("/", "~")) or ":\\" in text]


def _privacy_notes(what: Script, config: Config, on_line: Mapping[str, Any]) -> list[Note]:
    """Secrets on the command line, which other programs and W&B can read; paths, when W&B is on."""
    notes = [
        Note(
            logging.WARNING,
            f"--{name} on the command line can be read by other programs; use --config_file or the environment",
        )
        for name, value in on_line.items()
        if value and what.spec(name).secret
    ]
    if "log_with" in what.owners and config.value("log_with") in ("wandb", "all"):
        shown = shown_paths(on_line)
        if shown:
            notes.append(
                Note(
                    logging.INFO,
                    f"W&B may record the command line with these paths: {', '.join(shown)}; a --config_file avoids it",
                )
            )
    return notes
