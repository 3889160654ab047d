"""Names that trainers of video models hand on from their scripts: `from hv_train_network import ...`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from library.compat.namespace import options_of
from library.core.options import add_options, option_fields
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import cli, parser_common
from library.training.option_groups import SHARED_GROUPS, SamplingOptions
from library.training.sampling_prompts import VIDEO_LINE_OPTIONS, is_sample_due, parse_line
from library.training.sampling_prompts import load_prompts as read_prompts
from library.training.timesteps import density, flow_weights, nearest_table_sigmas
from library.training.wiring.video_options import VideoOptions

SS_METADATA_KEY_BASE_MODEL_VERSION = "ss_base_model_version"
SS_METADATA_KEY_NETWORK_MODULE = "ss_network_module"
SS_METADATA_KEY_NETWORK_DIM = "ss_network_dim"
SS_METADATA_KEY_NETWORK_ALPHA = "ss_network_alpha"
SS_METADATA_KEY_NETWORK_ARGS = "ss_network_args"
SS_METADATA_MINIMUM_KEYS = [
    SS_METADATA_KEY_BASE_MODEL_VERSION,
    SS_METADATA_KEY_NETWORK_MODULE,
    SS_METADATA_KEY_NETWORK_DIM,
    SS_METADATA_KEY_NETWORK_ALPHA,
    SS_METADATA_KEY_NETWORK_ARGS,
]


def line_to_prompt_dict(line: str) -> dict[str, Any]:
    """The settings of one prompt line of a video by name. Raises ConfigError for options that do not exist."""
    return parse_line(line, options=VIDEO_LINE_OPTIONS).to_dict()


def load_prompts(prompt_file: str) -> list[dict[str, Any]]:
    """The settings of every prompt of a file by name, `enum` being its place."""
    return [prompt.to_dict() for prompt in read_prompts(prompt_file, options=VIDEO_LINE_OPTIONS)]


def should_sample_images(args: Any, steps: int, epoch: int | None = None) -> bool:
    """Whether samples are due before the first step (0), after so many steps, or after an epoch where one is given."""
    at = "first" if steps == 0 else "step" if epoch is None else "epoch"
    return is_sample_due(options_of(args, SamplingOptions), at, steps, epoch or 0)


class collator_class:
    """`collate_fn` of a DataLoader over batches: tells the dataset, in whichever process it is, the epoch, and takes
    the one batch. `epoch` has a `value`."""

    def __init__(self, epoch: Any, dataset: Any) -> None:
        self.current_epoch, self.dataset = epoch, dataset

    def __call__(self, examples: list[Any]) -> Any:
        worker = torch.utils.data.get_worker_info()
        dataset = self.dataset if worker is None else worker.dataset
        dataset.set_current_epoch(self.current_epoch.value)
        return examples[0]


def compute_density_for_timestep_sampling(
    weighting_scheme: str, batch_size: int, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor:
    """Numbers in 0..1 [B] on the CPU that follow the density of --weighting_scheme, from torch's global generator."""
    u = torch.rand(batch_size, dtype=torch.float64)
    return density(
        weighting_scheme, u, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale
    ).float()  # fmt: skip


def get_sigmas(
    noise_scheduler: Any, timesteps: Tensor, device: torch.device, n_dim: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sigmas of the nearest of 1000 whole timesteps, with `n_dim` dimensions."""
    sigmas = nearest_table_sigmas(timesteps.to(device=device, dtype=torch.float32))
    return sigmas.reshape(-1, *[1] * (n_dim - 1)).to(dtype)


def compute_loss_weighting_for_sd3(
    weighting_scheme: str, noise_scheduler: Any, timesteps: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Weights of the loss [B, 1, 1, 1, 1] for --weighting_scheme; None where all weigh the same."""
    if weighting_scheme not in ("sigma_sqrt", "cosmap"):
        return None
    return flow_weights(weighting_scheme, get_sigmas(noise_scheduler, timesteps, device, 5, dtype))


def setup_parser_common() -> argparse.ArgumentParser:
    """A parser of the options that scripts of all families of videos have; `..._setup_parser` adds those of one."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    packages = [import_target(target) for target in parser_common.PACKAGE_GROUPS]
    network = parser_common.trainable_options("network")[0]
    return _with_groups(parser, [*SHARED_GROUPS, VideoOptions, network, *packages])


def _with_groups(parser: argparse.ArgumentParser, groups: list[type]) -> argparse.ArgumentParser:
    """The parser with the options of these groups that it lacks, each with its default."""
    for group in groups:
        known = {action.dest for action in parser._actions}
        add_options(parser, group, skip=known)
        fields = option_fields(group).items()
        parser.set_defaults(**{name: field.default for name, (field, _) in fields if name not in known})
    return parser


def _setup_parser(parser: argparse.ArgumentParser, family: str) -> argparse.ArgumentParser:
    script = parser_common.script(family, "network")
    own = import_target(record_of(family).family).options
    parser = _with_groups(parser, [own])
    parser.set_defaults(**{name: script.default(name) for name in script.owners})
    return parser


def hv_setup_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the options of HunyuanVideo."""
    return _setup_parser(parser, "hunyuan_video")


def wan_setup_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the options of Wan."""
    return _setup_parser(parser, "wan")


def fpack_setup_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the options of FramePack."""
    return _setup_parser(parser, "framepack")


def hv_main() -> None:
    """What `python hv_train_network.py` does."""
    cli.main("hunyuan_video", "network")


def wan_main() -> None:
    """What `python wan_train_network.py` does."""
    cli.main("wan", "network")


def fpack_main() -> None:
    """What `python fpack_train_network.py` does."""
    cli.main("framepack", "network")
