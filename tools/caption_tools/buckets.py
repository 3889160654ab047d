"""The training size of every image of a metadata file, and its latents: the cache of a data set, asked for in an older
way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.options import Config, equivalent_option, option
from library.scripts.folder_tool import (
    FolderTool,
    Tally,
    WriteOptions,
    files_of,
    folder_problem,
    logger,
    numbers_problem,
)
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.caption_tools.metadata import output_json_problems, read_metadata, write_metadata

if TYPE_CHECKING:
    from library.training.data_phase import DataGroups

FAMILIES_OF_KINDS = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}


@dataclass(frozen=True, kw_only=True)
class BucketToolOptions:
    """Images and model"""

    train_data_dir: str | None = option(None, help="folder of the images")
    in_json: str | None = option(None, help="metadata file with the captions or tags of the images")
    out_json: str | None = option(None, help="metadata file to write: the same with the training size of each image")
    model_name_or_path: str | None = option(
        None, help="Stable Diffusion 1, 2 or SDXL, whose autoencoder encodes the images"
    )
    v2: bool = equivalent_option(False, help="deprecated", reason="--v2: the model's file tells which it is")
    full_path: bool = option(False, help="images are named by their full paths in the metadata")
    recursive: bool = option(False, help="images in folders within the folder too; needs --full_path")
    batch_size: int = option(1, help="images of one size that go through the autoencoder at a time")
    max_data_loader_n_workers: int | None = option(None, help="images that are read at a time")
    mixed_precision: str = option(
        "no", choices=("no", "fp16", "bf16"), help="number format of the autoencoder; no = float32"
    )
    skip_existing: bool = equivalent_option(
        False, help="deprecated", reason="--skip_existing: latents that are valid are never made again anyway"
    )


@dataclass(frozen=True, kw_only=True)
class BucketSizeOptions:
    """Sizes"""

    max_resolution: str = option("512,512", help="width,height: no image is trained with more pixels")
    min_bucket_reso: int = option(256, help="shortest side")
    max_bucket_reso: int = option(1024, help="longest side")
    bucket_reso_steps: int = option(64, help="sides are multiples of this, itself a multiple of 64 (SDXL: of 32)")
    bucket_no_upscale: bool = option(False, help="make sizes from the images', never enlarging one")
    flip_aug: bool = option(False, help="latents of the mirrored images too")
    alpha_mask: bool = option(False, help="keep the alpha channel as weights of the loss")


CLASSES = (BucketToolOptions, BucketSizeOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool(
    "Choose the training size of every image of a metadata file and cache its latents", CLASSES,
    ("train_data_dir", "in_json", "out_json", "model_name_or_path"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    from library.checkpoints.kinds import check_slot

    options, sizes = config[BucketToolOptions], config[BucketSizeOptions]
    found = folder_problem("train_data_dir", options.train_data_dir)
    if found:
        yield found
    if not os.path.isfile(options.in_json):
        yield f"in_json is {options.in_json}, which does not exist"
    yield from output_json_problems(options.out_json, options.in_json, config)
    if options.recursive and not options.full_path:
        yield "--recursive needs --full_path: images of several folders may have one name"
    if options.batch_size < 1:
        yield f"--batch_size is {options.batch_size}; needed: 1 or more"
    found = numbers_problem("--max_resolution", sizes.max_resolution, 2)
    if found:
        yield found
    found = check_slot(options.model_name_or_path, "model_name_or_path", set(FAMILIES_OF_KINDS))
    if found:
        yield found.replace("--model_name_or_path", "model_name_or_path", 1)


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options, tally = config[BucketToolOptions], Tally()
    metadata = read_metadata(options.in_json)
    data = cached_data(config)
    for item in data.train.items:
        metadata[item.image_key]["train_resolution"] = list(item.bucket_reso)
        tally.done += 1
    tell_sizes(data)
    used = {os.path.abspath(item.absolute_path) for item in data.train.items}
    for _ in unnamed_images(options, used):
        tally.skip("not used, as they are not in the metadata or cannot be read")
    if tally.done:
        write_metadata(options.out_json, metadata)
    tally.finish("images with latents")


def cache_words(config: Config, family: str) -> list[str]:
    """The command of tools/cache_latents.py for the same work."""
    options, sizes = config[BucketToolOptions], config[BucketSizeOptions]
    words = [
        f"--family={family}", f"--pretrained_model_name_or_path={options.model_name_or_path}",
        f"--in_json={options.in_json}",
        f"--train_data_dir={options.train_data_dir}", f"--vae_batch_size={options.batch_size}",
        f"--mixed_precision={options.mixed_precision}",
        f"--resolution={sizes.max_resolution}", "--enable_bucket", f"--min_bucket_reso={sizes.min_bucket_reso}",
        f"--max_bucket_reso={sizes.max_bucket_reso}", f"--bucket_reso_steps={sizes.bucket_reso_steps}",
        "--skip_bad_images",
    ]  # fmt: skip
    words += [f"--{name}" for name in ("bucket_no_upscale", "flip_aug", "alpha_mask") if getattr(sizes, name)]
    if options.max_data_loader_n_workers is not None:
        words.append(f"--max_data_loader_n_workers={options.max_data_loader_n_workers}")
    return words


def cached_data(config: Config) -> DataGroups:
    """The images, each with its size, after their latents were cached. ConfigError with all that the data have against
    it."""
    from library.checkpoints.kinds import describe_checkpoint
    from library.core.registry import import_target
    from library.families.registry import record_of
    from library.training import cache_tools, parser_common
    from library.training.accelerator_setup import prepare_runtime
    from library.training.data_phase import find_data, group_data

    name = family_of(describe_checkpoint(config[BucketToolOptions].model_name_or_path).kind, config)
    words = cache_words(config, name)
    own = cache_tools.only_this_cache(
        parser_common.parse_script(words, cache_tools.tool_script(name, "latents")).config, "latents"
    )
    family = import_target(record_of(name).family)(own)
    problems = list(family.part_problems("vae"))
    if problems:
        raise ConfigError(problems)
    found = find_data(own, family.architecture)
    runtime = prepare_runtime(own)
    data = group_data(own, found, family.architecture, runtime.seed)
    cache_tools.fill("latents", own, family, data, runtime)
    return data


def family_of(kind: str, config: Config) -> str:
    """The family of a model file; a folder is told by the text encoders that SDXL has two of."""
    if kind in FAMILIES_OF_KINDS:
        return FAMILIES_OF_KINDS[kind]
    return (
        "sdxl" if os.path.isdir(os.path.join(config[BucketToolOptions].model_name_or_path, "text_encoder_2")) else "sd"
    )


def unnamed_images(options: BucketToolOptions, used: set[str]) -> list[str]:
    from library.dataset.media_utils import image_extensions

    known = image_extensions()
    images = [
        path
        for path in files_of(options.train_data_dir, options.recursive)
        if os.path.splitext(path)[1].lower() in known
    ]
    return [path for path in images if os.path.abspath(path) not in used]


def tell_sizes(data: DataGroups) -> None:
    """One log line for each size, and how far sizes are from the shapes of the images."""
    for dataset in data.train.datasets:
        info = dataset.assignment.bucket_info or {"buckets": {}, "mean_img_ar_error": 0.0}
        for bucket in info["buckets"].values():
            logger.info("%s: %d images", "x".join(map(str, bucket["resolution"])), bucket["count"])
        logger.info("mean error of width / height: %.4f", info["mean_img_ar_error"])
