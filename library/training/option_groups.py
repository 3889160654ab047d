"""The options that every trainer shares, one frozen dataclass per subject; those of memory, number formats and
processes are in computing_options.py. Each option is declared here or in the package that uses it, never twice. Rules
that need one group only are checked in its `__post_init__`; rules that look at several groups, at files or at installed
packages are in `checks.py`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import (
    LARGEST_BATCH,
    LARGEST_SEED,
    LARGEST_SIDE,
    count_or_none,
    equivalent_option,
    option,
)
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.dataset import parse_resolution
from library.training.attention_options import AttentionOptions
from library.training.computing_options import DdpOptions, DeepSpeedOptions, MemoryOptions, PrecisionOptions
from library.training.option_bounds import no_file_name, outside, raise_problems, too_small


def token_length(text: str | int) -> int | None:
    """A length of CLIP tokens; 75 is the same as not given."""
    length = count_or_none(text)
    return None if length == 75 else length


def interval_or_never(text: str | int) -> int | None:
    """An interval in steps or epochs; 0 and below mean never, as front ends write it."""
    try:
        value = int(text)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    return value if value > 0 else None


def precision_name(text: str) -> str:
    """A number format of files; fp32 is another name of float."""
    return "float" if text == "fp32" else text


@dataclass(frozen=True, kw_only=True)
class ConfigFileOptions:
    """Where options come from"""

    config_file: str | None = option(
        None, help="TOML file with options (.toml may be left out); the command line wins over it"
    )
    output_config: bool = option(
        False, help="write the options that differ from their defaults to --config_file and stop"
    )
    strict: bool = option(False, help="make an error of everything that the start page lists as ignored")

    def __post_init__(self) -> None:
        if self.output_config and self.config_file is None:
            raise ConfigError("--output_config needs --config_file: the file to write")


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions:
    """Messages on the console"""

    console_log_level: str | None = option(
        None,
        help="least severe level that is shown; INFO when not given",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, help="write the messages to this file (replaced) instead of the console"
    )
    console_log_simple: bool = option(False, help="messages alone, without time and level")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str | None = option(None, help="file or folder of the base model")
    vae: str | None = option(None, help="file of another VAE than the model's own")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that a run needs no network"
    )
    v2: bool = option(False, help="the base is Stable Diffusion 2")
    v_parameterization: bool = option(False, help="the base predicts velocity (Stable Diffusion 2.x 768)")
    max_token_length: int | None = option(
        None, help="longest caption in CLIP tokens; 75 when not given", choices=(None, 150, 225), convert=token_length
    )
    clip_skip: int | None = option(
        None, help="take the output of the n-th layer of the text encoder from the end; 0 = not given",
        convert=count_or_none
    )
    weighted_captions: bool = option(False, help="read (word:1.2) and [word] in captions as weights")
    disable_mmap_load_safetensors: bool = option(
        False,
        help="read model files whole instead of mapping them; quicker on network drives, and for files that Windows cannot map",
    )
    no_half_vae: bool = option(False, help="keep the VAE in float32 under mixed precision")

    def __post_init__(self) -> None:
        raise_problems(too_small(self, 1, "clip_skip"))


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """What is written about the file, in the file"""

    metadata_title: str | None = option(None, help="title; --output_name when not given")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="licence")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_usage_hint: str | None = option(None, help="how to use the file")
    metadata_thumbnail: str | None = option(None, help="thumbnail as a data: URL")
    metadata_merged_from: str | None = option(None, help="models that were merged into this one")
    metadata_trigger_phrase: str | None = option(None, help="words that call the learned concept")
    metadata_preprocessor: str | None = option(None, help="preprocessor that the model needs (ControlNet)")
    metadata_is_negative_embedding: str | None = option(None, help="whether it is meant for the negative prompt")
    metadata_reso: tuple[int, int] | None = option(
        None, convert=parse_resolution, metavar="W,H", most=LARGEST_SIDE,
        help="resolution that the file tells of, one number or width,height; that of the data when not given",
    )
    metadata_arch: str | None = option(
        None, help="architecture that the file tells of, in the place of the model's; what is trained stands behind a /"
        " of it unless it has one",
    )
    training_comment: str | None = option(None, help="any text, written to ss_training_comment")
    no_metadata: bool = option(False, help="write no training metadata into the file")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Length and order of the training"""

    max_train_steps: int = option(1600, help="optimizer steps of the run")
    max_train_epochs: int | None = option(
        None, help="epochs of the run; replaces --max_train_steps; 0 = not given", convert=count_or_none
    )
    max_data_loader_n_workers: int = option(
        8,
        help="processes that read images and caches; 0 = the main process reads; 2 when not given on Windows and macOS"
    )
    persistent_data_loader_workers: bool = option(
        False,
        help="keep the reading processes from epoch to epoch; always so on Windows and macOS, where each starts anew"
    )
    seed: int | None = option(
        None, convert=seed_of, most=LARGEST_SEED,
        help="number, or any text, that fixes every random draw; a drawn one is logged when not given",
    )
    gradient_accumulation_steps: int = option(1, help="batches per optimizer step", most=LARGEST_BATCH)

    def __post_init__(self) -> None:
        raise_problems(
            too_small(self, 1, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps")
            + too_small(self, 0, "max_data_loader_n_workers")
            + outside(self, 0, LARGEST_SEED, "seed")
        )




@dataclass(frozen=True, kw_only=True)
class OverflowOptions:
    """Number formats of files"""

    clamp_overflow: bool = option(
        False,
        help="bound numbers that the format of the written file cannot hold (65504 in fp16, 448 in fp8); refused by name when not given",
    )


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OverflowOptions):
    """Where and when files are written"""

    output_dir: str | None = option(None, help="folder of the trained files and samples; made when missing")
    output_name: str | None = option(
        None, help="name of the files without ending; 'last' for the final file when not given"
    )
    on_existing: str | None = option(
        None,
        help="what becomes of the files, states and samples of an earlier run of this name, unless --resume goes on with it: backup (when"
        " not given) renames them to NAME-backup1, -backup2 and so on; overwrite replaces the files and renames the "
        "states alone; refuse stops",
        choices=("backup", "overwrite", "refuse"),
    )
    overwrite: bool = option(False, help="short for --on_existing overwrite")
    save_precision: str | None = option(
        None,
        help="number format of the saved weights; that of the trained weights when not given (float32, or that of --full_*)",
        choices=(None, "float", "fp32", "fp16", "bf16"),
        convert=precision_name,
    )
    save_every_n_epochs: int | None = option(None, help="write a file every n epochs; 0 = never", convert=count_or_none)
    save_every_n_steps: int | None = option(None, help="write a file every n steps; 0 = never", convert=count_or_none)
    save_n_epoch_ratio: int | None = option(
        None, help="write about n files, spread over the epochs; 0 = not given", convert=count_or_none
    )
    save_last_n_epochs: int | None = option(None, help="keep only the epoch files of the last n epochs")
    save_last_n_epochs_state: int | None = option(
        None, help="keep the epoch states of the last n epochs; replaces --save_last_n_epochs for states"
    )
    save_last_n_steps: int | None = option(None, help="keep only the step files of the last n steps")
    save_last_n_steps_state: int | None = option(
        None, help="keep the step states of the last n steps; replaces --save_last_n_steps for states"
    )
    save_state: bool = option(False, help="write a state folder, to resume from, beside every file")
    save_state_on_train_end: bool = option(False, help="write a state folder at the end")
    save_model_as: str | None = option(
        "safetensors",
        help="format of the files; ckpt and pt are pickles without metadata; diffusers (with .bin files) and diffusers_safetensors"
        " write folders of whole models, which have the layout of their base when it is not given",
        choices=(None, "ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"),
    )

    def __post_init__(self) -> None:
        problems = too_small(
            self,
            1,
            "save_every_n_epochs",
            "save_every_n_steps",
            "save_n_epoch_ratio",
            hint="; leave it out to save at the end only",
        )
        problems += too_small(
            self, 0, "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state"
        )
        if self.overwrite and self.on_existing not in (None, "overwrite"):
            problems.append(f"--overwrite is set with --on_existing {self.on_existing}; leave one of them out")
        raise_problems(problems + no_file_name(self, "output_name"))

    @property
    def what_of_existing(self) -> str:
        """backup, overwrite or refuse."""
        return self.on_existing or ("overwrite" if self.overwrite else "backup")


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Moving average of the weights"""

    ema: bool = option(
        False,
        help="keep a moving average of the trained weights (EMA): samples and validation use it, files get a companion <name>-ema",
    )
    ema_decay: float = option(0.999, help="share of the average that an update leaves")
    ema_power: float | None = option(
        None,
        help="let the share grow from 0 to --ema_decay as 1 - n^-power over the updates, e.g. 0.75; at once --ema_decay when not given",
    )
    ema_every_n_steps: int = option(1, help="update the average every n optimizer steps")
    ema_start_step: int = option(
        0, help="optimizer step from which on is averaged; the average is the weights themselves until then"
    )
    ema_on_cpu: bool = option(False, help="keep the average in main memory")

    def __post_init__(self) -> None:
        problems = too_small(self, 1, "ema_every_n_steps") + too_small(self, 0, "ema_start_step")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"--ema_decay is {self.ema_decay}; needed: a number from 0, below 1, e.g. 0.999")
        if self.ema_power is not None and not 0 < self.ema_power <= 1:
            problems.append(f"--ema_power is {self.ema_power}; needed: a number above 0, up to 1")
        given = [name for name in ("ema_power", "ema_start_step", "ema_on_cpu") if getattr(self, name)]
        given += ["ema_every_n_steps"] if self.ema_every_n_steps != 1 else []
        if given and not self.ema:
            problems.append(f"--{given[0]} is set without --ema, which it belongs to; add it")
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class HookOptions:
    """Code of your own around the steps"""

    hook: list[str] | None = option(
        None,
        nargs="+",
        metavar="PACKAGE.MODULE:CLASS",
        repeatable=True,
        help="a class of library.training.hooks.base:Hook to be called at every step, save and sample; can be given several times, and its own"
        " options are options of the script then (--hook ... --help shows them)",
    )


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Upload to the Hugging Face hub"""

    huggingface_repo_id: str | None = option(
        None, help="repository that receives the files, as owner/name; made when missing"
    )
    huggingface_repo_type: str | None = option(None, help="model (when not given), dataset or space")
    huggingface_path_in_repo: str | None = option(None, help="folder inside the repository")
    huggingface_token: str | None = option(
        None, help="access token; better: log in with 'hf auth login' or set HF_TOKEN", secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, help="public, anything else is private; private when not given"
    )
    save_state_to_huggingface: bool = option(False, help="upload state folders too")
    async_upload: bool = option(False, help="upload in the background; the last file is always waited for")

    def __post_init__(self) -> None:
        problems = []
        if self.huggingface_repo_type not in (None, "", "model", "dataset", "space"):
            problems.append(
                f"--huggingface_repo_type is '{self.huggingface_repo_type}'; needed: model, dataset or space"
            )
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Going on with an earlier run"""

    resume: str | None = option(
        None,
        help="state folder of the run to go on with; a folder of states takes its newest; 'latest' takes the newest of this run's name in"
        " --output_dir, or begins when there is none",
    )
    resume_from_huggingface: bool = option(
        False, help="--resume names a folder on the hub: owner/name/path[:revision[:type]]"
    )
    initial_step: int | None = option(
        None, help="count steps from here; replaces the step of the state and --initial_epoch"
    )
    initial_epoch: int | None = option(
        None, help="count epochs from here (1 = the first); replaces the epoch of the state"
    )
    skip_until_initial_step: bool = equivalent_option(
        False,
        help="leave out the batches before the first step",
        reason="--skip_until_initial_step: a run always goes on at the exact batch of its first step",
    )

    def __post_init__(self) -> None:
        raise_problems(too_small(self, 0, "initial_step") + too_small(self, 1, "initial_epoch"))


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Curves"""

    logging_dir: str | None = option(
        None, help="folder of the TensorBoard and W&B logs; each run makes its own folder inside"
    )
    log_with: str | None = option(
        None, help="who keeps the curves; tensorboard when only --logging_dir is given",
        choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option(None, help="text before the time in the folder name of a run")
    log_tracker_name: str | None = option(None, help="name of the project; network_train when not given")
    log_tracker_config: str | None = option(None, help="TOML file with settings of the tracker")
    log_config: bool = option(False, help="record the options of the run with the curves (never secrets and paths)")
    wandb_run_name: str | None = option(None, help="name of the run on W&B")
    wandb_api_key: str | None = option(
        None, help="key of W&B; better: wandb login or the variable WANDB_API_KEY", secret=True
    )

    def __post_init__(self) -> None:
        problems = no_file_name(self, "log_prefix")
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            problems.append(f"--log_with is {self.log_with} without --logging_dir, the folder of the logs; add it")
        if self.log_tracker_name is not None and self.log_with != "wandb":  # TensorBoard makes a folder of it
            problems += no_file_name(self, "log_tracker_name")
        raise_problems(problems)


@dataclass(frozen=True, kw_only=True)
class ProgressOptions:
    """How a run is watched"""

    progress: str | None = option(
        None,
        help="how the run shows where it stands: a panel, a bar, lines of the log or nothing; when not given a panel "
        "on a terminal, elsewhere the bar as a line every ten seconds",
        choices=("panel", "bar", "lines", "none"),
    )
    no_progress: bool = option(False, help="the same as --progress lines")
    log_every: int | None = option(
        None, help="steps from one line of the log to the next, with --progress lines, which it stands for; 10 when "
        "not given"
    )
    loss_curve_steps: int | None = option(
        None, help="how many of the last losses the curve of the panel shows; 500 when not given"
    )
    log_metrics: bool = option(
        False,
        help="append each step's loss, rates and speed as a line of JSON to NAME-metrics.jsonl in the output folder",
    )
    emit_events: bool = option(
        False, help="write a line __EVENT__:TYPE:JSON to standard output when the run begins, has written files, ends"
    )

    def __post_init__(self) -> None:
        problems = too_small(self, 1, "log_every", "loss_curve_steps")
        if self.progress not in (None, "lines"):
            if self.no_progress:
                problems.append(
                    f"--no_progress means --progress lines, and --progress is {self.progress}; leave one out"
                )
            if self.log_every is not None:
                problems.append(
                    f"--log_every is {self.log_every} with --progress {self.progress}; it needs --progress lines"
                )
        raise_problems(problems)

    @property
    def display(self) -> str | None:
        """One of the choices of --progress; None where the terminal decides."""
        return "lines" if self.no_progress or self.log_every is not None else self.progress


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sample images while training"""

    sample_every_n_steps: int | None = option(
        None, help="make sample images every n steps; 0 = never", convert=interval_or_never
    )
    sample_every_n_epochs: int | None = option(
        None, help="make sample images every n epochs; replaces --sample_every_n_steps; 0 = never",
        convert=interval_or_never
    )
    sample_at_first: bool = option(False, help="make sample images before the first step")
    sample_prompts: str | None = option(None, help="file of prompts (.txt, .toml or .json)")
    textual_inversion_embeddings: list[str] | None = option(
        None, nargs="*",
        help="files of textual inversions whose words sample prompts may have; the name of a file without its ending "
        "is the word. Captions do not know them"
    )

    def __post_init__(self) -> None:
        raise_problems(too_small(self, 1, "sample_every_n_steps", "sample_every_n_epochs"))


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Loss on held-out images"""

    validate_every_n_steps: int | None = option(None, help="validate every n steps", convert=count_or_none)
    validate_every_n_epochs: int | None = option(
        None, help="validate every n epochs; every epoch when not given", convert=count_or_none
    )
    max_validation_steps: int | None = option(
        None, help="most batches per validation; all when not given", convert=count_or_none
    )

    def __post_init__(self) -> None:
        raise_problems(too_small(self, 1, "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"))


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Changed noise (diffusion families with a noise schedule)"""

    noise_offset: float | None = option(None, help="strength of an added per-channel offset of the noise")
    noise_offset_random_strength: bool = option(False, help="draw the strength from 0..--noise_offset")
    adaptive_noise_scale: float | None = option(None, help="add the mean of the latents times this to the noise offset")
    multires_noise_iterations: int | None = option(
        None, help="noise of several resolutions: number of levels (6 to 10)", most=1000
    )
    multires_noise_discount: float = option(0.3, least=0, most=1, help="share of each coarser level of the noise")
    ip_noise_gamma: float | None = option(None, help="strength of the noise that perturbs the input alone")
    ip_noise_gamma_random_strength: bool = option(False, help="draw the strength from 0..--ip_noise_gamma")
    zero_terminal_snr: bool = option(False, help="rescale the noise schedule to end without signal")

    def __post_init__(self) -> None:
        problems = too_small(self, 0, "multires_noise_iterations", "ip_noise_gamma")
        if self.adaptive_noise_scale and not self.noise_offset:
            problems.append("--adaptive_noise_scale is set without --noise_offset, which it scales; add it")
        raise_problems(problems)


SHARED_GROUPS: tuple[type, ...] = (
    ConfigFileOptions,
    PluginOptions,
    ModelOptions,
    SavingOptions,
    EmaOptions,
    LoopOptions,
    PrecisionOptions,
    MemoryOptions,
    AttentionOptions,
    ResumeOptions,
    SamplingOptions,
    ValidationOptions,
    LoggingOptions,
    ProgressOptions,
    ConsoleOptions,
    MetadataOptions,
    HubOptions,
    NoiseOptions,
    DdpOptions,
    DeepSpeedOptions,
    HookOptions,
)
