"""Datasets without a configuration file: from --train_data_dir, --reg_data_dir, --in_json or
--conditioning_data_dir."""

from __future__ import annotations

import os
from typing import Any

from library.dataset import DatasetOptions
from library.dataset.config_reading import ProblemList

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


def config_from_options(
    options: DatasetOptions, problems: ProblemList, warnings: list[str], *, kinds: frozenset[str]
) -> dict[str, Any]:
    """The configuration that the folder options stand for, in the form of a parsed file. Looks at the folders."""
    if options.conditioning_data_dir is not None and "CN" not in kinds:
        problems.add(
            "conditioning_data_dir", "conflict", "--conditioning_data_dir holds masks here and needs --masked_loss"
        )
    if options.in_json is not None:
        subsets = [_metadata_subset(options, problems)]
    elif options.conditioning_data_dir is not None or kinds == {"CN"}:
        subsets = _conditioning_subsets(options, problems)
    else:
        subsets = _folder_subsets(options, problems, warnings)
    return {"datasets": [{"subsets": subsets}]}


def _metadata_subset(options: DatasetOptions, problems: ProblemList) -> dict[str, Any]:
    for name in ("reg_data_dir", "conditioning_data_dir"):
        if getattr(options, name) is not None:
            problems.add(name, "conflict", f"--{name} has no use with --in_json; describe both in a --dataset_config")
    subset = {"metadata_file": options.in_json}
    if options.train_data_dir is not None:
        subset["image_dir"] = options.train_data_dir
    return subset


def _conditioning_subsets(options: DatasetOptions, problems: ProblemList) -> list[dict[str, Any]]:
    if options.reg_data_dir is not None:
        problems.add("reg_data_dir", "conflict", "--reg_data_dir has no use with --conditioning_data_dir")
    lacking = [name for name in ("train_data_dir", "conditioning_data_dir") if getattr(options, name) is None]
    for name in lacking:
        problems.add(name, "missing", f"--{name} is needed (or a --dataset_config)")
    if lacking:
        return []
    return [{
        "num_repeats": 1, "image_dir": options.train_data_dir, "conditioning_data_dir": options.conditioning_data_dir,
    }]  # fmt: skip


def _folder_subsets(options: DatasetOptions, problems: ProblemList, warnings: list[str]) -> list[dict[str, Any]]:
    if options.train_data_dir is None:
        problems.add(
            "train_data_dir",
            "missing",
            "no images are given; use --dataset_config FILE, or --train_data_dir with N_name folders",
        )
        return []
    subsets = _numbered_folders("train_data_dir", options.train_data_dir, problems, warnings)
    if options.reg_data_dir is not None:
        found = _numbered_folders("reg_data_dir", options.reg_data_dir, problems, warnings)
        subsets += [{**subset, "is_reg": True} for subset in found]
    return subsets


def _numbered_folders(option: str, parent: str, problems: ProblemList, warnings: list[str]) -> list[dict[str, Any]]:
    """A subset for each folder `N_name` of `parent`, sorted by name: N repeats, the rest is class_tokens."""
    if not os.path.isdir(parent):
        problems.add(option, "missing", f"--{option} {parent} is not a folder")
        return []
    names = sorted(os.listdir(parent))
    subsets = []
    for name in names:
        folder = os.path.join(parent, name)
        if not os.path.isdir(folder):
            continue
        number, _, words = name.partition("_")
        try:
            repeats = int(number)
        except ValueError:
            warnings.append(f"{folder} is ignored: its name does not begin with a number of repeats, as in 10_name")
            continue
        if repeats >= 1:
            subsets.append({"image_dir": folder, "num_repeats": repeats, "class_tokens": words})
        else:
            warnings.append(
                f"{folder} is ignored: its name asks for {repeats} repeats; 1 or more are needed, as in 10_name"
            )
    if not subsets:
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        hint = (
            f"; it holds {len(images)} images itself: move them to {os.path.join(parent, '1_name')}" if images else ""
        )
        problems.add(
            option,
            "missing",
            f"--{option} {parent} has no sub-folders named N_name (N = repeats, e.g. 10_mydog){hint}. A "
            "--dataset_config takes any folder",
        )
    return subsets
