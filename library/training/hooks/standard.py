"""The hooks of every run, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.core.options import Config
from library.dataset import DatasetOptions
from library.training.hooks.base import Hook
from library.training.hooks.checkpoint import CheckpointHook, MetadataMaker
from library.training.hooks.ema import EmaHook
from library.training.hooks.events import EventHook
from library.training.hooks.finish import FinishHook
from library.training.hooks.finite import NonFiniteGuard
from library.training.hooks.info_noise import InfoNoiseHook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.loss_curve import LossCurveHook
from library.training.hooks.losses import LossReader
from library.training.hooks.sample import SampleHook
from library.training.hooks.validation import ValidationHook
from library.training.option_groups import EmaOptions, HubOptions, ProgressOptions
from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions, is_enabled

if TYPE_CHECKING:
    from library.dataset.strategies import Texts
    from library.huggingface_util import Uploader
    from library.training.accelerator_setup import Runtime
    from library.training.sampling_prompts import SamplePrompt
    from library.training.trainables.base import Trainable


def standard_hooks(
    config: Config, runtime: Runtime, *, prompts: list[SamplePrompt], conditioning: Texts,
    trainable: Trainable,
    of_trainable: Sequence[Hook], own: Sequence[Hook], metadata: MetadataMaker,
) -> list[Hook]:
    """Losses are read first and tested before they are logged; what changes weights (norms) comes before what looks at
    them (the average first), and files are written before samples are made, so that a failing sample costs no
    checkpoint."""
    seed = config[DatasetOptions].validation_seed
    return [
        NonFiniteGuard(),
        LoggingHook(),
        LossCurveHook(),
        *of_trainable,
        *([EmaHook(trainable.modules, config[EmaOptions])] if config[EmaOptions].ema else []),
        *own,
        *([InfoNoiseHook(config[InfoNoiseOptions])] if is_enabled(config) else []),
        LossReader(),
        ValidationHook(runtime.seed if seed is None else seed),
        CheckpointHook(metadata, uploader_of(config[HubOptions])),
        *([EventHook()] if config[ProgressOptions].emit_events else []),
        SampleHook(prompts, conditioning, runtime.seed),
        FinishHook(),
    ]


def uploader_of(options: HubOptions) -> Uploader | None:
    """Uploads files to the hub, when a repository is named."""
    if options.huggingface_repo_id is None:
        return None
    from library.huggingface_util import HubTarget, Uploader

    target = HubTarget(
        options.huggingface_repo_id, options.huggingface_repo_type, options.huggingface_path_in_repo,
        options.huggingface_token, options.huggingface_repo_visibility,
    )
    return Uploader(target, options.async_upload)
