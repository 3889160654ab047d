"""Names of files and states, what is removed, states of accelerate, and what metadata hold."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any

from library.compat.namespace import options_of
from library.core.errors import ConfigError
from library.safetensors_utils import read_header
from library.training.checkpoint import CheckpointNames, outdated_epoch, outdated_step
from library.training.hooks.standard import uploader_of
from library.training.metadata import commit_hash
from library.training.option_groups import HubOptions, ResumeOptions, SavingOptions

logger = logging.getLogger(__name__)


def get_epoch_ckpt_name(args: Any, ext: str, epoch_no: int) -> str:
    return CheckpointNames(args.output_name).epoch(epoch_no) + ext


def get_step_ckpt_name(args: Any, ext: str, step_no: int) -> str:
    return CheckpointNames(args.output_name).step(step_no) + ext


def get_last_ckpt_name(args: Any, ext: str) -> str:
    return CheckpointNames(args.output_name).last() + ext


def get_remove_epoch_no(args: Any, epoch_no: int) -> int | None:
    """The epoch whose file goes when that of `epoch_no` was written, or None."""
    if args.save_last_n_epochs is None:
        return None
    return outdated_epoch(epoch_no, args.save_every_n_epochs, args.save_last_n_epochs)


def get_remove_step_no(args: Any, step_no: int) -> int | None:
    """The step whose file goes when that of `step_no` was written, or None."""
    if args.save_last_n_steps is None:
        return None
    return outdated_step(step_no, args.save_every_n_steps, args.save_last_n_steps)


# -- states of accelerate --------------------------------------------------------------------------------------------


def save_and_remove_state_on_epoch_end(args: Any, accelerator: Any, epoch_no: int) -> None:
    """accelerate's state after a finished epoch (from 1), and the one that falls out of --save_last_n_epochs(_state)
    goes."""
    options = options_of(args, SavingOptions)
    keep = options.save_last_n_epochs if options.save_last_n_epochs_state is None else options.save_last_n_epochs_state
    old = None if keep is None else outdated_epoch(epoch_no, options.save_every_n_epochs, keep)
    names = CheckpointNames(options.output_name)
    _save_state(
        args, accelerator, names.state(names.epoch(epoch_no)), None if old is None else names.state(names.epoch(old))
    )


def save_and_remove_state_stepwise(args: Any, accelerator: Any, step_no: int) -> None:
    """accelerate's state after a step, and the one that falls out of --save_last_n_steps(_state) goes."""
    options = options_of(args, SavingOptions)
    keep = options.save_last_n_steps if options.save_last_n_steps_state is None else options.save_last_n_steps_state
    old = None if keep is None else outdated_step(step_no, options.save_every_n_steps, keep)
    names = CheckpointNames(options.output_name)
    _save_state(
        args, accelerator, names.state(names.step(step_no)), None if old is None else names.state(names.step(old))
    )


def save_state_on_train_end(args: Any, accelerator: Any) -> None:
    names = CheckpointNames(args.output_name)
    _save_state(args, accelerator, names.state(names.last()), None)


def _save_state(args: Any, accelerator: Any, name: str, old: str | None) -> None:
    folder = os.path.join(args.output_dir, name)
    os.makedirs(args.output_dir, exist_ok=True)
    accelerator.save_state(folder)
    hub = options_of(args, HubOptions)
    if hub.save_state_to_huggingface and hub.huggingface_repo_id:
        uploader_of(hub)(folder, name, wait=True)
    outdated = None if old is None else os.path.join(args.output_dir, old)
    if outdated is not None and os.path.isdir(outdated):
        logger.info("removing the old state %s", outdated)
        shutil.rmtree(outdated)


def resume_from_local_or_hf_if_specified(accelerator: Any, args: Any) -> None:
    """Load the state of accelerate that --resume names, from the disk or from the hub; nothing without the option."""
    options = options_of(args, ResumeOptions)
    if not options.resume:
        return
    folder: Any = options.resume
    if options.resume_from_huggingface:
        from library.huggingface_util import download_folder, parse_hub_folder

        folder = download_folder(parse_hub_folder(options.resume), options_of(args, HubOptions).huggingface_token)
    if not os.path.isdir(folder):
        raise ConfigError(f"--resume is {folder}; a state folder is needed")
    logger.info("going on from the state %s", folder)
    accelerator.load_state(str(folder))


# -- metadata --------------------------------------------------------------------------------------------------------


def load_metadata_from_safetensors(safetensors_file: str) -> dict[str, str]:
    """Metadata of a safetensors file, empty for files of other kinds."""
    return read_header(safetensors_file)[1] if str(safetensors_file).endswith(".safetensors") else {}


def build_minimum_network_metadata(
    v2: bool | None, base_model: str | None, network_module: str, network_dim: str, network_alpha: str,
    network_args: Mapping[str, Any] | None,
) -> dict[str, str]:
    """The keys that a file of a network has with --no_metadata. `base_model` is ss_base_model_version."""
    metadata = {"ss_network_module": network_module, "ss_network_dim": network_dim, "ss_network_alpha": network_alpha}
    if v2 is not None:
        metadata["ss_v2"] = v2
    if base_model is not None:
        metadata["ss_base_model_version"] = base_model
    if network_args is not None:
        metadata["ss_network_args"] = json.dumps(network_args)
    return metadata


def get_git_revision_hash() -> str:
    return commit_hash() or "(unknown)"
