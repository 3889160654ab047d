"""Rules over several option groups, files and installed packages, looked at before anything heavy is loaded.

Each function takes a Config and returns messages; `collect` calls them all, together with the checks of the family and
of the trainable, so that one start reports every problem. Settings of the datasets are checked where they are read,
those of optimizer, schedule and timesteps in their packages.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.atomic_file import unwritable_problem
from library.core.errors import AtelierError, ConfigError, Problems, problems_of
from library.core.file_limits import cut_name, name_length, name_limit
from library.core.options import Config, MissingGroup
from library.core.text_files import parse_toml, read_text
from library.dataset import CachingOptions, DatasetOptions
from library.training.checkpoint import CURVE_ENDINGS, FOLDER_FORMATS, CheckpointNames
from library.training.computing_options import MemoryOptions
from library.training.device_checks import precision_problems, precision_warnings
from library.training.earlier_runs import existing_problems, final_file, resumed_state
from library.training.formula_checks import formula_problems
from library.training.idle_options import strict_problems
from library.training.new_words import learned_word
from library.training.option_groups import (
    HubOptions,
    LoggingOptions,
    LoopOptions,
    MetadataOptions,
    ProgressOptions,
    ResumeOptions,
    SamplingOptions,
    SavingOptions,
)
from library.training.own_hooks import companion_endings
from library.training.progress_display import can_hold_panel
from library.training.sampling_prompts import (
    IMAGE_LINE_OPTIONS,
    LineOption,
    holds_no_prompt,
    load_prompts,
    sample_file_name,
)
from library.training.schedulers import SchedulerOptions, parse_step_count
from library.training.whole_models import side_endings

if TYPE_CHECKING:
    from library.checkpoints.embeddings import WordVectors
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily


def collect(config: Config, family: ModelFamily, trainable: Trainable) -> list[str]:
    """Every problem of a run that can be seen before models are loaded; empty when it can start."""
    problems = Problems()
    for message in strict_problems(config, family, trainable):
        problems.add(message)
    for check in CHECKS:
        for message in check(config):
            problems.add(message)
    for check in (cached_text_problems, changed_fixed_problems, layout_problems, attention_problems):
        for message in check(config, family, trainable):
            problems.add(message)
    for message in sampling_problems(config, family.prompt_options()):
        problems.add(message)
    found = problems_of(family.check)
    for message in [*found, *prompt_word_problems(config, family, has_model=not found)]:
        problems.add(message)
    problems.attempt(lambda: trainable.check(family))
    return problems.messages


def all_problems(config: Config, family: type[ModelFamily], trainable: type[Trainable]) -> list[str]:
    """The problems of a Config in which groups of options are missing, as far as what is there tells: every check that
    does not need them, and the data."""
    from library.training.data_phase import find_data, side_limit_of

    problems = Problems()

    def attempt(step: Callable[[], list[str] | None]) -> None:
        try:
            for message in step() or ():
                problems.add(message)
        except MissingGroup:
            pass
        except ConfigError as error:
            problems.absorb(error)
        except AtelierError as error:
            problems.add(str(error))

    for check in CHECKS:
        attempt(lambda: check(config))
    attempt(lambda: sampling_problems(config, family.prompt_options()))
    attempt(lambda: cached_text_problems(config, family(config), trainable(config)))
    attempt(lambda: changed_fixed_problems(config, family(config), trainable(config)))
    attempt(lambda: layout_problems(config, family(config), trainable(config)))
    attempt(lambda: attention_problems(config, family(config), trainable(config)))
    attempt(lambda: family(config).check())
    attempt(lambda: trainable(config).check(family(config)))
    rules = trainable.dataset_rules(family)
    attempt(lambda: find_data(config, family.architecture, rules, side_limit_of(family(config))) and None)
    return problems.messages


def raise_problems(config: Config, family: ModelFamily, trainable: Trainable) -> None:
    """Raise one ConfigError with everything that `collect` finds."""
    messages = collect(config, family, trainable)
    if messages:
        raise ConfigError(messages)


def output_problems(config: Config) -> list[str]:
    """The output folder is given, can be made and written to. It is not made: another check may still fail."""
    output_dir = config[SavingOptions].output_dir
    if config[DatasetOptions].debug_dataset:
        return []
    if not output_dir:
        return ["--output_dir is not given; needed: the folder for the trained files"]
    problem = unwritable_problem("output_dir", output_dir)
    return [problem] if problem else name_problems(config)


def make_output_folder(config: Config) -> None:
    """Once all checks have passed. ConfigError when it cannot be made after all."""
    try:
        os.makedirs(config[SavingOptions].output_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output_dir is {config[SavingOptions].output_dir}; it cannot be made ({error.strerror or error})"
        ) from error


def name_problems(config: Config) -> list[str]:
    """No name that the run will write is longer than the file system takes."""
    saving = config[SavingOptions]
    names, limit = CheckpointNames(saving.output_name, saving.save_model_as), name_limit(saving.output_dir or ".")
    stem = (
        max(names.step(0), names.epoch(0), key=len)
        if saving.save_every_n_steps or saving.save_every_n_epochs
        else names.last()
    )
    written = [
        *(
            names.companion(stem, f"{ending}{side}")
            for ending in companion_endings(config)
            for side in ("", *side_endings(config))
        ),
        *(f"{names.last()}{ending}" for ending in CURVE_ENDINGS),
    ]
    written.append(names.state(names.step(0)))  # a signal at any step leaves one
    if config[SamplingOptions].sample_prompts:
        written.append(
            Path(sample_file_name(saving.output_name, "epoch", 0, enum=0, seed=0xFFFFFFFF, timestamp="0" * 14)).name
        )
    longest = max(written, key=name_length)
    surplus = name_length(longest) - limit
    if surplus <= 0:
        return []
    shown = cut_name(saving.output_name or "", 40)
    return [
        f"--output_name is '{shown}...', {name_length(saving.output_name or '')} long; names of its files would be up to {limit + surplus}"
        f" long, and the file system takes {limit}: shorten it by {surplus}"
    ]


def cached_text_problems(config: Config, family: ModelFamily, trainable: Trainable) -> list[str]:
    """Outputs of a text encoder that learns cannot be cached: where all learn, a cache is asked for in vain, unless the
    family lets them learn beside one. Captions that change are a matter of the dataset settings."""
    training = trainable.follows_text_encoders(family)
    beside = {number for number, learns in enumerate(training) if learns} <= set(family.record.learning_encoders)
    if not config[CachingOptions].caches_text or not training or not all(training) or beside:
        return []
    otherwise = f"{trainable.keeps_text_still} or " if trainable.keeps_text_still else ""
    return [
        f"text encoders are trained and their outputs cached; {otherwise}leave out --cache_text_encoder_outputs"
    ]


def layout_problems(config: Config, family: ModelFamily, trainable: Trainable) -> list[str]:
    """What is trained can be a folder, where one is asked for."""
    layout = config[SavingOptions].save_model_as
    can = trainable.writes_folders and (family.writes_folders or trainable.has_own_folder)
    if layout not in FOLDER_FORMATS or can:
        return []
    if trainable.writes_folders:
        return [f"--save_model_as is {layout}; models of this family are not written as folders, use safetensors"]
    return [f"--save_model_as is {layout}, a folder for whole models; what is trained here is one file: use safetensors"]


def attention_problems(config: Config, family: ModelFamily, trainable: Trainable) -> list[str]:
    """What computes the attention is installed, and computes where the run does."""
    return list(family.attention.problems)


def sampling_problems(config: Config, options: Mapping[str, LineOption] = IMAGE_LINE_OPTIONS) -> list[str]:
    """The prompt file exists and has a prompt that can be read; others are told and left out."""
    path = config[SamplingOptions].sample_prompts
    if path is None or holds_no_prompt(path):
        return []
    if not Path(path).is_file():
        return [f"--sample_prompts is {path}; there is no such file"]
    try:
        load_prompts(path, options, left_out=[])
    except ConfigError as error:
        return list(error.problems)
    return []


def prompt_words(config: Config, family: ModelFamily) -> list[WordVectors]:
    """The words of --textual_inversion_embeddings. ConfigError."""
    from library.generation.words import read_words

    files = config[SamplingOptions].textual_inversion_embeddings
    return read_words(files, (), family.embedding_widths(), "textual_inversion_embeddings") if files else []


def prompt_word_problems(config: Config, family: ModelFamily, *, has_model: bool) -> list[str]:
    """Files of words fit the text encoders, where these can be told."""
    from library.generation.words import missing_files

    files = config[SamplingOptions].textual_inversion_embeddings
    if files and not family.record.embedding_keys:
        return [
            f"--textual_inversion_embeddings: {family.name} has no textual inversion: no words can be added to its text"
        ]
    learned = learned_word(config)
    twice = [
        f"--textual_inversion_embeddings: {path} gives the word '{learned}', which this run learns (--token_string); "
        "rename the file, or give it as --weights to begin with its vectors"
        for path in files or ()
        if Path(path).stem == learned
    ]
    if not has_model:
        return [*twice, *missing_files(files or (), "textual_inversion_embeddings")]
    return [*twice, *problems_of(lambda: prompt_words(config, family))]


def resume_problems(config: Config) -> list[str]:
    """The state to go on with is there and has steps left."""
    resume, loop = config[ResumeOptions], config[LoopOptions]
    problems = []
    if resume.resume_from_huggingface:
        if (resume.resume or "").count("/") < 2:
            problems.append(
                f"--resume is {resume.resume}; with --resume_from_huggingface it is owner/name/path[:revision[:type]]"
            )
    elif resume.resume:
        problems += _state_problems(config)
    bounded_by_steps = loop.max_train_epochs is None
    if resume.initial_step is not None and bounded_by_steps and resume.initial_step >= loop.max_train_steps:
        problems.append(
            f"--initial_step is {resume.initial_step} with --max_train_steps {loop.max_train_steps}; no step is left to train: lower the one or raise the other"
        )
    counts_epochs = resume.initial_step is None and resume.initial_epoch is not None and not bounded_by_steps
    if counts_epochs and resume.initial_epoch > loop.max_train_epochs:
        problems.append(
            f"--initial_epoch is {resume.initial_epoch} with --max_train_epochs {loop.max_train_epochs}; no epoch is left to train: lower the one or raise the other"
        )
    return problems


def _state_problems(config: Config) -> list[str]:
    """Every file of the state is as it was written, and a step is left. One process of a machine looks at the files."""
    from library.training.state import content_problems
    from library.training.state_files import read_train_state, state_problems

    resume, loop = config[ResumeOptions], config[LoopOptions]
    try:
        folder = resumed_state(config)
    except ConfigError as error:
        return list(error.problems)
    if folder is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    problems = state_problems(folder) or content_problems(folder)
    if problems:
        return problems
    step = read_train_state(folder)["current_step"]
    explicit = resume.initial_step is not None or resume.initial_epoch is not None
    writes_file = step == loop.max_train_steps and not final_file(config).exists()
    if not explicit and loop.max_train_epochs is None and step >= loop.max_train_steps and not writes_file:
        return [
            f"--resume is {folder}, a run after step {step}; --max_train_steps is {loop.max_train_steps}: no step is left, raise it"
        ]
    return []


def changed_fixed_problems(config: Config, family: ModelFamily, trainable: Trainable) -> list[str]:
    """What the state to go on with is bound to is as in the run that wrote it."""
    from library.training.run_settings import fixed_problems, fixed_settings, read_settings
    from library.training.state_files import STATE_FILE, read_train_state

    try:
        folder = resumed_state(config)
        if folder is None or not (folder / STATE_FILE).is_file():
            return []
        state, recorded, own = (
            read_train_state(folder),
            read_settings(folder),
            fixed_settings(config, family, trainable),
        )
    except ConfigError:
        return []  # told by the check of --resume
    except AtelierError as error:
        return [str(error)]
    return fixed_problems(folder, state, recorded, config[LoopOptions].seed, own, trainable.begins_with)


def logging_problems(config: Config) -> list[str]:
    """The packages that keep the curves are installed; their settings can be read."""
    logs = config[LoggingOptions]
    problems = []
    if logs.log_with in ("tensorboard", "all") or (logs.log_with is None and logs.logging_dir):
        problems += _package_problems(
            "tensorboard", "--logging_dir" if logs.log_with is None else f"--log_with {logs.log_with}", "tensorboard"
        )
    if logs.logging_dir:
        problem = unwritable_problem("logging_dir", logs.logging_dir)
        problems += [problem] if problem else []
    if logs.log_with in ("wandb", "all"):
        problems += _package_problems("wandb", f"--log_with {logs.log_with}", "atelier[wandb]")
    if logs.log_tracker_config is not None:
        problems += _toml_problems("log_tracker_config", logs.log_tracker_config)
    return problems


def progress_problems(config: Config) -> list[str]:
    """The package that draws the panel is installed, where it is asked for by name."""
    return _package_problems("rich", "--progress panel", "rich") if config[ProgressOptions].display == "panel" else []


def _package_problems(package: str, wanted_by: str, install: str) -> list[str]:
    if importlib.util.find_spec(package) is not None:
        return []
    return [
        f"{wanted_by} needs the package {package}, which is not installed; install it with: pip install '{install}'"
    ]


def _toml_problems(name: str, path: str) -> list[str]:
    try:
        parse_toml(read_text(path, f"--{name} is {path}, which"), f"--{name} is {path}: it")
    except ConfigError as error:
        return list(error.problems)
    return []


FILES_OF_A_RUN, FILES_PER_WORKER = 64, 16


def open_files_problems(config: Config) -> list[str]:
    """The processes that load images hand tensors over as open files; where too few may be open, they wait for ever.
    The limit of this process is raised as far as the system lets it."""
    workers = min(config[LoopOptions].max_data_loader_n_workers, os.cpu_count() or 1)
    if workers == 0 or importlib.util.find_spec("resource") is None:  # Windows
        return []
    import resource

    needed = FILES_OF_A_RUN + FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return []
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return []
    return [
        f"--max_data_loader_n_workers is {config[LoopOptions].max_data_loader_n_workers}; with {workers} of them a run needs {needed} open files and"
        f" this system lets it have {hard}: raise it (ulimit -n {needed}), or take --max_data_loader_n_workers 0"
    ]


def metadata_problems(config: Config) -> list[str]:
    """The thumbnail and the source date can be read."""
    from library.sai_model_spec import source_date, thumbnail_url

    try:
        source_date()
        thumbnail_url(config[MetadataOptions].metadata_thumbnail)
    except ConfigError as error:
        return list(error.problems)
    except OSError as error:
        return [
            f"--metadata_thumbnail is {config[MetadataOptions].metadata_thumbnail}; it cannot be read ({error.strerror})"
        ]
    return []


def hub_problems(config: Config) -> list[str]:
    repository = config[HubOptions].huggingface_repo_id
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return [f"--huggingface_repo_id is {repository}; needed: owner/name"]
    return []


def compile_problems(config: Config) -> list[str]:
    """The backend of --torch_compile is one that works here, and nothing that is not compiled stands in a block
    that is to be compiled whole."""
    memory = config[MemoryOptions]
    if not memory.compiles:
        return []
    from library.training.compilation import backend_problems

    problems = backend_problems(memory.dynamo_backend)
    drawing = drawn_inside(config) if memory.dynamo_fullgraph else []
    if drawing:
        problems.append(
            f"--dynamo_fullgraph is set with {', '.join(drawing)}, which draw by the number of the step and are not"
            " compiled; leave --dynamo_fullgraph out: blocks are then compiled in pieces around them"
        )
    return problems


def drawn_inside(config: Config) -> list[str]:
    """The options of an adapter of ours that draw anew in every forward, as they were given."""
    from library.training.adapters import NetworkOptions

    if NetworkOptions not in config or not config[NetworkOptions].module_path.startswith("networks."):
        return []
    network = config[NetworkOptions]
    found = [f"--network_dropout {network.network_dropout:g}"] if network.network_dropout else []
    for name in ("dropout", "rank_dropout", "module_dropout", "ggpo_sigma"):
        with contextlib.suppress(ValueError):  # said by the check of the arguments
            if float(network.pairs.get(name) or 0):
                found.append(f"--network_args {name}={network.pairs[name]}")
    return found


CHECKS: tuple[Callable[[Config], list[str]], ...] = (
    output_problems,
    existing_problems,
    resume_problems,
    logging_problems,
    progress_problems,
    hub_problems,
    metadata_problems,
    open_files_problems,
    compile_problems,
    precision_problems,
    formula_problems,
)


def warnings(config: Config) -> list[str]:
    """Options that do something else in this run than one may think."""
    saving, sampling, loop = config[SavingOptions], config[SamplingOptions], config[LoopOptions]
    lines = []
    if saving.save_every_n_epochs and saving.save_n_epoch_ratio:
        lines.append("--save_n_epoch_ratio replaces --save_every_n_epochs")
    if sampling.sample_every_n_epochs and sampling.sample_every_n_steps:
        lines.append("--sample_every_n_epochs replaces --sample_every_n_steps")
    if wants_samples(sampling) and not sampling.sample_prompts:
        lines.append("no sample images are made: --sample_prompts, the file of the prompts, is not given")
    if wants_samples(sampling) and holds_no_prompt(sampling.sample_prompts):
        lines.append(f"--sample_prompts is {sampling.sample_prompts}, which holds no prompt: no sample images are made")
    if loop.max_train_epochs is not None and "max_train_steps" in config.explicit:
        lines.append("--max_train_epochs replaces --max_train_steps")
    warmup = parse_step_count(config[SchedulerOptions].lr_warmup_steps).resolve(loop.max_train_steps)
    if loop.max_train_epochs is None and warmup >= loop.max_train_steps > 1:
        lines.append(
            f"--lr_warmup_steps is {warmup} of {loop.max_train_steps} steps: the full learning rate is never reached"
        )
    if saving.save_model_as in ("ckpt", "pt") and not config[MetadataOptions].no_metadata:
        lines.append(f"--save_model_as {saving.save_model_as} holds no metadata; safetensors does")
    if config[ProgressOptions].display == "panel" and not can_hold_panel():
        lines.append("--progress is panel, and standard error is no terminal that can hold one: the bar is shown")
    return lines + precision_warnings(config)


def wants_samples(sampling: SamplingOptions) -> bool:
    return bool(sampling.sample_at_first or sampling.sample_every_n_steps or sampling.sample_every_n_epochs)
