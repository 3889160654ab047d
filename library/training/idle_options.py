"""What the user wrote and has no effect in this run: options that mean nothing to the script (`Config.ignored`) and
settings of features that are off. The start page lists all of it in one block; --strict makes each an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.core.options import Config, Ignored, option_fields, without_effect
from library.dataset import FOLDER_OPTIONS, DatasetOptions
from library.training import loss_weights
from library.training.alignment import LeapOptions, SelfFlowOptions, SraOptions
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.formula_checks import idle_formulas
from library.training.option_groups import (
    ConfigFileOptions,
    ConsoleOptions,
    HookOptions,
    HubOptions,
    LoggingOptions,
    LoopOptions,
    NoiseOptions,
    ProgressOptions,
    ResumeOptions,
    SamplingOptions,
    SavingOptions,
    ValidationOptions,
)
from library.training.packing_options import NavitOptions, idle_beside_packs
from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions

if TYPE_CHECKING:
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

_HUB = (
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
)
_VALIDATION = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
_NOISE = {
    "noise_offset_random_strength": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "multires_noise_discount": "multires_noise_iterations",
}
"""settings of a kind of noise -> what switches it on"""
PLUG_INS: dict[type, str] = {
    InfoNoiseOptions: "infonoise_enabled", SelfFlowOptions: "self_flow", SraOptions: "sra_enabled",
    LeapOptions: "leap_enabled", NavitOptions: "navit_packing",
}  # fmt: skip
"""groups of options -> the switch of each"""


def ignored(config: Config, family: ModelFamily | None = None, trainable: Trainable | None = None) -> list[Ignored]:
    """Everything without effect, in the order in which the start page shows it; with what family and trainable know."""
    found = [*config.ignored, *(Ignored(f"--{name}", reason) for name, reason in _idle(config)), *idle_formulas(config)]
    if family is not None:
        found += loss_weights.idle_cap(config, family.objective())
        found += idle_beside_packs(config, family)
        found += [*family.idle(), *family.attention.idle, *family.idle_text_form(), *_idle_swap(config, family)]
    if trainable is not None and family is not None:
        found += trainable.idle(family)
    return found


def strict_problems(config: Config, family: ModelFamily | None = None, trainable: Trainable | None = None) -> list[str]:
    """Under --strict: one message for everything without effect."""
    if not config[ConfigFileOptions].strict:
        return []
    return [
        f"{item} (--strict is set, which takes nothing without effect)" for item in ignored(config, family, trainable)
    ]


def as_block(items: Sequence[Ignored]) -> str:
    """The lines that scripts without a start page write to the log."""
    return "\n".join(
        ["ignored, as it has no effect here (--strict makes it an error):", *(f"  {item}" for item in items)]
    )


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    """Option -> reason, of settings whose feature is off."""
    yield from _idle_saving(config[SavingOptions])
    yield from _idle_samples(config[SamplingOptions])
    yield from _idle_memory(config)
    yield from _idle_logs(config[LoggingOptions])
    yield from _idle_plug_ins(config)
    progress = config[ProgressOptions]
    hidden = config[ConsoleOptions].console_log_level
    if progress.display == "lines" and hidden in ("WARNING", "ERROR", "CRITICAL"):
        given = (name for name in ("progress", "log_every") if getattr(progress, name) is not None)
        reason = f"has no effect with --console_log_level {hidden}, which hides these lines"
        yield from ((name, reason) for name in given)
    if progress.loss_curve_steps is not None and progress.display not in (None, "panel"):
        yield "loss_curve_steps", f"has no effect without the panel, and --progress {progress.display} is shown"
    noise, hub, resume = config[NoiseOptions], config[HubOptions], config[ResumeOptions]
    for name, owner in _NOISE.items():
        if name in config.explicit and getattr(noise, name) and not getattr(noise, owner):
            yield name, f"has no effect without --{owner}"
    if hub.huggingface_repo_id is None:
        yield from (
            (name, "has no effect without --huggingface_repo_id, the repository") for name in _HUB if getattr(hub, name)
        )
    if resume.resume_from_huggingface and not resume.resume:
        yield "resume_from_huggingface", "has no effect without --resume"
    yield from _idle_data(config)


def _idle_plug_ins(config: Config) -> Iterator[tuple[str, str]]:
    """Settings of what a switch of their group puts on, without it. A hook that is named by its path may read any."""
    for group, switch in PLUG_INS.items():
        is_off = group in config and not getattr(config[group], switch)
        if is_off and not (HookOptions in config and config[HookOptions].hook):
            written = (name for name in option_fields(group) if name in config.explicit and name != switch)
            yield from ((name, f"has no effect without --{switch}") for name in written)
    for names, is_idle, reason in _idle_by_value(config):
        yield from ((name, f"has no effect with {reason}") for name in names if is_idle and name in config.explicit)


def _idle_by_value(config: Config) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Options of losses that are on, whether others make them idle, and which."""
    leap = config[LeapOptions] if LeapOptions in config else LeapOptions()
    sra = config[SraOptions] if SraOptions in config else SraOptions()
    flow = config[SelfFlowOptions] if SelfFlowOptions in config else SelfFlowOptions()
    yield (
        ("leap_min_gap", "leap_nested_grad_coe"), leap.leap_enabled and leap.leap_variant == "sparse",
        "--leap_variant sparse, whose steps all begin at true places",
    )  # fmt: skip
    yield ("leap_enabled",), leap.leap_enabled and not leap.leap_ratio, "--leap_ratio 0, no share of the steps"
    yield ("sra_enabled",), sra.sra_enabled and not sra.sra_weight, "--sra_weight 0"
    yield ("sra_decay_start", "sra_decay_end"), sra.sra_enabled and sra.sra_decay == "none", "--sra_decay none"
    yield ("sra_decay_end",), sra.sra_enabled and sra.sra_decay == "jump", "--sra_decay jump, at --sra_decay_start"
    couples = bool(flow.self_flow_teacher_coupling_prob)
    of_coupling = [f"self_flow_teacher_{name}" for name in ("mismatch_ratio", "coupling_decay", "coupling_decay_steps")]
    yield (
        tuple(of_coupling), flow.self_flow and not couples, "--self_flow_teacher_coupling_prob 0, no share of the steps"
    )  # fmt: skip
    yield (
        ("self_flow_teacher_coupling_decay_steps",),
        flow.self_flow and couples and flow.self_flow_teacher_coupling_decay == "constant",
        "--self_flow_teacher_coupling_decay constant",
    )  # fmt: skip
    yield (
        ("self_flow_gamma_warmup_steps", "mask_ratio"), flow.self_flow and not flow.self_flow_gamma,
        "--self_flow_gamma 0: the model learns without the loss on features",
    )  # fmt: skip


def _idle_data(config: Config) -> Iterator[tuple[str, str]]:
    data = config[DatasetOptions]
    if data.dataset_config is not None:
        given = (name for name in FOLDER_OPTIONS if getattr(data, name) is not None)
        yield from ((name, "has no effect with --dataset_config, which names the folders") for name in given)
        return
    if not data.validation_split:
        asked = [name for name in _VALIDATION if getattr(config[ValidationOptions], name)]
        asked += ["validation_seed"] if data.validation_seed is not None else []
        yield from ((name, "has no effect without --validation_split") for name in asked)
    if data.keep_tokens and not (data.shuffle_caption or data.caption_tag_dropout_rate or data.token_warmup_step):
        yield (
            "keep_tokens",
            "has no effect without --shuffle_caption or --caption_tag_dropout_rate, from which it keeps tags",
        )


def _idle_saving(saving: SavingOptions) -> Iterator[tuple[str, str]]:
    for unit in ("epochs", "steps"):
        every = getattr(saving, f"save_every_n_{unit}") or (unit == "epochs" and saving.save_n_epoch_ratio)
        for name in (f"save_last_n_{unit}", f"save_last_n_{unit}_state"):
            if getattr(saving, name) and not every:
                yield name, f"has no effect without --save_every_n_{unit}"


def _idle_samples(sampling: SamplingOptions) -> Iterator[tuple[str, str]]:
    given = [
        name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if getattr(sampling, name)
    ]
    if given and not sampling.sample_prompts:
        yield from (
            (name, "makes no sample images without --sample_prompts, the file of the prompts") for name in given
        )
    if sampling.sample_prompts and not given:
        yield (
            "sample_prompts",
            "has no effect without --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first",
        )
    if sampling.textual_inversion_embeddings and not (sampling.sample_prompts and given):
        yield "textual_inversion_embeddings", "has no effect: its words are for sample images, and none are made"


def _idle_swap(config: Config, family: ModelFamily) -> list[Ignored]:
    given = "block_swap_ring_size" in config.explicit and not family.swaps_blocks
    return without_effect(["block_swap_ring_size"] if given else [], "no blocks are swapped (--blocks_to_swap)")


def _idle_memory(config: Config) -> Iterator[tuple[str, str]]:
    memory, loop = config[MemoryOptions], config[LoopOptions]
    if memory.cpu_offload_checkpointing and not memory.gradient_checkpointing:
        yield "cpu_offload_checkpointing", "has no effect without --gradient_checkpointing, whose blocks it moves"
    if memory.torch_compile and memory.dynamo_backend == "no":
        yield "torch_compile", "has no effect with --dynamo_backend no"
    settings = {
        "dynamo_backend": memory.dynamo_backend not in ("inductor", "no"), "dynamo_mode": memory.dynamo_mode,
        "dynamo_fullgraph": memory.dynamo_fullgraph, "dynamo_dynamic": memory.dynamo_dynamic is not None,
        "dynamo_cache_size_limit": memory.dynamo_cache_size_limit,
    }  # fmt: skip
    if not memory.torch_compile:
        yield from ((name, "has no effect without --torch_compile") for name, is_set in settings.items() if is_set)
    if config[PrecisionOptions].fp8_fast and not config[PrecisionOptions].fp8_scaled:
        yield "fp8_fast", "has no effect without --fp8_scaled, whose numbers it multiplies"
    yield from _idle_sums(config[PrecisionOptions])
    if loop.persistent_data_loader_workers and loop.max_data_loader_n_workers == 0:
        yield "persistent_data_loader_workers", "has no effect with --max_data_loader_n_workers 0"


def _idle_sums(precision: PrecisionOptions) -> Iterator[tuple[str, str]]:
    if not precision.fp16_accumulation:
        return
    from library.device_utils import fp16_sums_lack, get_preferred_device

    if (lack := fp16_sums_lack(get_preferred_device())) is not None:
        yield "fp16_accumulation", f"has no effect: {lack}"
    elif precision.mixed_precision != "fp16":
        yield "fp16_accumulation", f"has no effect: --mixed_precision is {precision.mixed_precision}; needed: fp16"


def _idle_logs(logs: LoggingOptions) -> Iterator[tuple[str, str]]:
    """Settings of curves that nobody keeps, or of W&B without it."""
    rows = []
    if not (logs.logging_dir or logs.log_with):
        rows += [
            (name, "--logging_dir") for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
        ]
    if logs.log_with not in ("wandb", "all"):
        rows += [(name, "--log_with wandb") for name in ("wandb_run_name", "wandb_api_key")]
    yield from ((name, f"has no effect without {needed}") for name, needed in rows if getattr(logs, name))
