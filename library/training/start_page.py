"""Collects what the start summary shows from a Run that is ready."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from library.core.attention_modes import AttentionChoice
from library.core.options import option_fields
from library.dataset import CachingOptions
from library.dataset.packing import fill_of
from library.families.latents import Bucket
from library.training import schedulers
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.data_phase import DataGroups
from library.training.formula_checks import formula_notices, formula_warnings
from library.training.idle_options import as_block, ignored
from library.training.optimizers import OptimizerBuild, OptimizerOptions
from library.training.option_groups import LoopOptions, ModelOptions, SamplingOptions, SavingOptions
from library.training.run import Run
from library.training.sampling_prompts import unreached_interval
from library.training.schedulers import SchedulerOptions
from library.training.summary import BucketSummary, DatasetSummary, PackSummary, StartSummary, start_summary
from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions

if TYPE_CHECKING:
    from library.dataset.custom import CustomDataset
    from library.dataset.dataset import Dataset
    from library.dataset.packing import Packing
    from library.dataset.plan import BucketList

logger = logging.getLogger(__name__)


def print_start(run: Run, built: OptimizerBuild, data: DataGroups) -> None:
    """Print the page; lines about changed meanings go to the log as well."""
    summary = summary_of(run, built, data)
    if summary.ignored and not logger.isEnabledFor(logging.INFO):
        logger.warning("%s", as_block(ignored(run.config, run.family, run.trainable)))
    logger.info("%s", start_summary(summary))


def summary_of(run: Run, built: OptimizerBuild, data: DataGroups) -> StartSummary:
    config, progress, runtime = run.config, run.progress, run.runtime
    saving, scheduler = config[SavingOptions], config[SchedulerOptions]
    return StartSummary(
        model=run.family.name,
        files=_files(run),
        precision=_precision(run),
        datasets=[_dataset(dataset, data) for dataset in data.train.datasets],
        num_epochs=progress.num_epochs,
        max_train_steps=progress.max_train_steps,
        steps_per_epoch=progress.steps_per_epoch,
        gradient_accumulation_steps=config[LoopOptions].gradient_accumulation_steps,
        num_processes=runtime.num_processes,
        device=str(runtime.device),
        optimizer=built.metadata_text,
        lr_scheduler=schedulers.name_in_use(scheduler, config[OptimizerOptions]),
        learning_rates={
            group.get("name") or f"group {i}": None
            if built.choice.finds_own_rate
            else float(group.get("initial_lr", group["lr"]))
            for i, group in enumerate(run.optimizer.param_groups)
        },
        network=run.trainable.description(),
        parts=_trained_parts(run),
        memory=_memory(run),
        seed=runtime.seed,
        seed_was_drawn=runtime.seed_was_drawn,
        output=os.path.abspath(saving.output_dir or "."),
        first_step=progress.global_step,
        ignored=[str(item) for item in ignored(config, run.family, run.trainable)],
        outputs=[line for lines in run.hooks.planned_files(run) for line in lines],
        notes=[
            *run.trainable.notices(),
            *unreached_intervals(run),
            *(config[InfoNoiseOptions].notices(progress.max_train_steps) if InfoNoiseOptions in config else []),
            *pack_notes(data),
            *formula_warnings(config),
            *formula_notices(config, run.step.objective),
        ],
    )


def unreached_intervals(run: Run) -> list[str]:
    """Intervals of saves and samples that are longer than the run."""
    saving, progress = run.config[SavingOptions], run.progress
    finished = progress.max_train_steps // progress.steps_per_epoch
    lines = []
    for name, reached, unit in (
        ("save_every_n_epochs", progress.num_epochs, "epochs"),
        ("save_every_n_steps", progress.max_train_steps, "steps"),
    ):  # fmt: skip
        every = getattr(saving, name)
        if every and every > reached:
            lines.append(
                f"--{name} is {every}, longer than the run of {reached} {unit}: only the file at the end is written"
            )
    name = unreached_interval(run.config[SamplingOptions], progress.max_train_steps, finished)
    if name is not None and run.config[SamplingOptions].sample_prompts:
        unit, length = ("epochs", finished) if name.endswith("epochs") else ("steps", progress.max_train_steps)
        every = getattr(run.config[SamplingOptions], name)
        lines.append(f"--{name} is {every}, longer than the run of {length} full {unit}: samples are made at the end")
    return lines


def _files(run: Run) -> dict[str, str]:
    models = run.config[ModelOptions]
    files = {"base model": models.pretrained_model_name_or_path or "", **({"vae": models.vae} if models.vae else {})}
    family = run.family.opts
    for name in option_fields(type(family)):
        value = getattr(family, name)
        if isinstance(value, str) and os.path.exists(value):
            files[name] = value
    return files


def _precision(run: Run) -> str:
    precision, runtime = run.config[PrecisionOptions], run.runtime
    text = f"computing in {str(runtime.weight_dtype).removeprefix('torch.')}" + (
        " (autocast)" if precision.mixed_precision != "no" else ""
    )
    if precision.mixed_precision_transformer:
        text += ", frozen weights as their file has them"
    if runtime.denoiser_form:
        text += f", frozen weights in {runtime.denoiser_form}"
    if form := run.family.text_form(runtime):
        text += f", text encoders in {form}"
    return f"{text}, trained weights in {str(runtime.trained_dtype).removeprefix('torch.')}"


def _dataset(dataset: Dataset | CustomDataset, data: DataGroups) -> DatasetSummary:
    params, packing = getattr(dataset, "params", None), getattr(data.train, "packing", None)
    if params is None:  # a class of the user's
        return DatasetSummary(
            name=type(dataset).__name__, resolution=(0, 0), batch_size=dataset.batch_size,
            num_images=dataset.num_train_images, num_samples=dataset.num_train_images,
        )
    held_out = (
        [d for d in data.validation.datasets if d.params.label == params.label] if data.validation is not None else []
    )
    own = [item for item in dataset.items if not item.is_reg]
    return DatasetSummary(
        name=params.label or "dataset",
        resolution=params.resolution,
        batch_size=params.batch_size,
        num_images=sum(item.clip is None for item in own),
        num_clips=sum(item.clip is not None for item in own),
        num_videos=len({item.absolute_path for item in own if item.clip is not None}),
        num_samples=dataset.num_train_images,
        num_reg_images=sum(item.is_reg for item in dataset.items),
        num_validation_images=sum(len(d.items) for d in held_out),
        buckets=tuple(_bucket(dataset, bucket) for bucket in dataset.buckets),
        packs=pack_summary(dataset, packing),
        keeps_sizes=params.native is not None,
    )


def pack_summary(dataset: Dataset, packing: Packing | None) -> PackSummary | None:
    """The packs of its first epoch; None without packing."""
    if packing is None:
        return None
    tokens, packs = dataset.tokens, dataset.packs(packing, 1, dataset.seed)
    packed = sum(map(len, packs))
    return PackSummary(
        count=len(packs), token_budget=packing.token_budget, fill=fill_of(packs, tokens, packing),
        samples=(min(map(len, packs)), max(map(len, packs))),
        left_out=sum(len(bucket.samples) for bucket in dataset.buckets) - packed,
    )


def pack_notes(data: DataGroups) -> list[str]:
    """Settings that have no effect on packs."""
    packing = getattr(data.train, "packing", None)
    if packing is None:
        return []
    effect = "has no effect" if data.validation is None else "counts for validation alone"
    whole = [
        f"{dataset.params.label}: --navit_drop_last leaves nothing out, as there is one pack"
        for dataset in data.train.datasets
        if packing.drop_last and not pack_summary(dataset, packing).left_out
    ]
    return whole + [
        f"{dataset.params.label}: batch_size is {dataset.batch_size} and {effect};"
        " --navit_token_budget says how many samples a training step has"
        for dataset in data.train.datasets
        if dataset.batch_size > 1
    ]


def _bucket(dataset: Dataset, bucket: BucketList) -> BucketSummary:
    is_clip = {dataset.items[sample].clip is not None for sample in bucket.samples}
    width, height, frames = Bucket(*bucket.bucket)[:3]
    return BucketSummary(
        width=width, height=height, frames=frames if True in is_clip or frames > 1 else None,
        num_images=len(bucket.samples), num_batches=-(-len(bucket.samples) // bucket.batch_size),
        word="sample" if len(is_clip) > 1 else "clip" if True in is_clip else "image",
    )


def _trained_parts(run: Run) -> dict[str, int]:
    return {
        group.get("name") or f"group {i}": sum(parameter.numel() for parameter in group["params"])
        for i, group in enumerate(run.optimizer.param_groups)
    }


def _memory(run: Run) -> list[str]:
    memory, caching = run.config[MemoryOptions], run.config[CachingOptions]
    lines = []
    if caching.caches_latents:
        lines.append("latents cached " + ("on disk" if caching.cache_latents_to_disk else "in memory"))
    if caching.caches_text:
        lines.append(
            "text encoder outputs cached " + ("on disk" if caching.cache_text_encoder_outputs_to_disk else "in memory")
        )
    resident = [
        name
        for name, part in (
            ("VAE", run.models.vae),
            ("text encoders", any(e is not None for e in run.models.text_encoders)),
        )
        if part
    ]
    lines.append("loaded beside the denoiser: " + (", ".join(resident) or "nothing"))
    if run.family.attention.choice != AttentionChoice():
        lines.append(f"attention: {run.family.attention.choice}")
    if memory.gradient_checkpointing:
        lines.append("gradient checkpointing" + (" with inputs on the CPU" if memory.cpu_offload_checkpointing else ""))
    count = run.family.blocks_to_swap
    if count:
        lines.append(f"{count} block{'' if count == 1 else 's'} swapped")
    return lines
