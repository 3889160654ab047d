"""From a dataset configuration to datasets in the steps that other code knows: load, sanitize, generate a blueprint,
build."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.compat.arguments import add_config_arguments
from library.compat.datasets import ARCHITECTURE, DatasetGroup
from library.compat.namespace import options_of
from library.config_util import Blueprint as OwnBlueprint
from library.config_util import DatasetConfigError, load_blueprint
from library.core.options import option_fields
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.build import build_dataset_groups
from library.dataset.config_folders import config_from_options
from library.dataset.config_reading import ConfigReader, ProblemList, read_config_file
from library.dataset.items import DatasetParams

__all__ = [
    "BlueprintGenerator", "ConfigSanitizer", "add_config_arguments", "generate_controlnet_subsets_config_by_subdirs",
    "generate_dataset_group_by_blueprint", "generate_dreambooth_subsets_config_by_subdirs", "load_user_config",
]  # fmt: skip

logger = logging.getLogger(__name__)

SCRIPTS = {frozenset({"DB"}): "train_db", frozenset({"FT"}): "fine_tune", frozenset({"CN"}): "train_controlnet"}
"""kinds of dataset -> a script that takes just these"""


def load_user_config(file: str) -> dict[str, Any]:
    """The content of a .toml or .json file. ConfigError when it cannot be read."""
    return read_config_file(Path(file))


class ConfigSanitizer:
    """Checks a configuration for the kinds of dataset that a script takes."""

    def __init__(
        self, support_dreambooth: bool, support_finetuning: bool, support_controlnet: bool, support_dropout: bool
    ) -> None:
        if not (support_dreambooth or support_finetuning or support_controlnet):
            raise ValueError("one kind of dataset at least must be supported: dreambooth, finetuning or controlnet")
        taken = {"DB": support_dreambooth, "FT": support_finetuning, "CN": support_controlnet}
        self.kinds = frozenset(kind for kind, is_taken in taken.items() if is_taken)
        self.supports_dropout = support_dropout

    def sanitize_user_config(self, user_config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with values in their types. DatasetConfigError with every problem."""
        problems = ProblemList()
        tables = ConfigReader(problems, kinds=self.kinds, supports_dropout=self.supports_dropout).read(user_config)
        if problems.items:
            raise DatasetConfigError(problems.items)
        datasets = [
            dict(dataset.table.values) if dataset.is_flat
            else {**dataset.table.values, "subsets": [dict(subset.values) for subset in dataset.subsets]}
            for dataset in tables.datasets
        ]
        return {"general": dict(tables.general.values), "datasets": datasets}

    def sanitize_argparse_namespace(self, argparse_namespace: Any) -> Any:
        """The namespace as it is. ConfigError when an option of datasets has a value that it cannot take."""
        options_of(argparse_namespace, DatasetOptions)
        return argparse_namespace


@dataclass(frozen=True)
class DatasetGroupBlueprint:
    """The settings of all datasets, and the options that go with them."""

    blueprint: OwnBlueprint
    options: DatasetOptions
    seed: int

    @property
    def datasets(self) -> tuple[DatasetParams, ...]:
        return self.blueprint.datasets


@dataclass(frozen=True)
class Blueprint:
    dataset_group: DatasetGroupBlueprint


class BlueprintGenerator:
    """Resolves every setting of a configuration: subset, dataset, general, command line, default; the first that is set
    wins."""

    def __init__(self, sanitizer: ConfigSanitizer) -> None:
        self.sanitizer = sanitizer

    def generate(self, user_config: Mapping[str, Any], argparse_namespace: Any, **runtime_params: Any) -> Blueprint:
        """`runtime_params` (tokenizers, say) are taken for compatibility: captions are tokenized by the strategies."""
        options, kinds = options_of(argparse_namespace, DatasetOptions), self.sanitizer.kinds
        given = {
            name for group in (DatasetOptions, CachingOptions) for name, (field, _) in option_fields(group).items()
            if getattr(argparse_namespace, name, field.default) != field.default
        }
        blueprint = load_blueprint(
            options, options_of(argparse_namespace, CachingOptions), explicit=frozenset(given),
            architecture=ARCHITECTURE,
            script=SCRIPTS.get(kinds - {"CN"} or kinds, "train_network"), supports_cn="CN" in kinds,
            supports_dropout=self.sanitizer.supports_dropout, content=user_config,
        )
        return Blueprint(DatasetGroupBlueprint(blueprint, options, getattr(argparse_namespace, "seed", None) or 0))


def generate_dataset_group_by_blueprint(
    dataset_group_blueprint: DatasetGroupBlueprint,
) -> tuple[DatasetGroup, DatasetGroup | None]:
    """(training images, validation images or None)."""
    groups = build_dataset_groups(
        dataset_group_blueprint.blueprint, dataset_group_blueprint.options, architecture=ARCHITECTURE,
        seed=dataset_group_blueprint.seed
    )
    train, validation = (None if group is None else DatasetGroup(group.datasets) for group in groups)
    return train, validation


def generate_dreambooth_subsets_config_by_subdirs(
    train_data_dir: str | None = None, reg_data_dir: str | None = None
) -> list[dict[str, Any]]:
    """A subset for every folder `N_name` of both; ConfigError when there is none."""
    return _subsets(DatasetOptions(train_data_dir=train_data_dir, reg_data_dir=reg_data_dir), "DB")


def generate_controlnet_subsets_config_by_subdirs(
    train_data_dir: str | None = None, conditioning_data_dir: str | None = None, caption_extension: str = ".txt"
) -> list[dict[str, Any]]:
    """The one subset of a folder of images and a folder of masks or control images."""
    options = DatasetOptions(train_data_dir=train_data_dir, conditioning_data_dir=conditioning_data_dir)
    return [{**subset, "caption_extension": caption_extension} for subset in _subsets(options, "CN")]


def _subsets(options: DatasetOptions, kind: str) -> list[dict[str, Any]]:
    problems, warnings = ProblemList(), []
    content = config_from_options(options, problems, warnings, kinds=frozenset({kind}))
    if problems.items:
        raise DatasetConfigError(problems.items)
    for line in warnings:
        logger.warning("%s", line)
    return content["datasets"][0]["subsets"]
