"""The dataset configuration: from a TOML or JSON file and the command line to a Blueprint of checked, resolved
settings.

Every problem of a configuration is reported, not only the first; each has the path of its key
(`datasets[0].subsets[1].KEY`) and a kind: unknown_key, wrong_type, out_of_range, missing or conflict.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError
from library.core.lazy_names import homes, lazy_names
from library.dataset import FOLDER_OPTIONS, CachingOptions, DatasetOptions
from library.dataset.architectures import DataArchitecture
from library.dataset.captions import dotted
from library.dataset.config_checks import check_resolution, check_subset, checked_limits, notices, same_sources
from library.dataset.config_folders import config_from_options
from library.dataset.config_reading import (
    BAD,
    ConfigProblem,
    ConfigReader,
    ConfigTables,
    DatasetTables,
    ProblemList,
    Scope,
    Table,
    read_config_file,
    with_new_names,
)
from library.dataset.config_schema import CONTROL, KEYS
from library.dataset.config_sources import (
    FLAT_BUCKETS,
    FlatScope,
    check_area,
    check_shared_caches,
    check_sources,
    check_targets,
    idle_beside_native,
    idle_bucket_settings,
    learns_videos,
    source_settings,
    sources_of,
    told,
)
from library.dataset.items import DatasetParams, SubsetParams
from library.dataset.native_sizes import RULE, NativeSizes

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes(
    "library.compat.dataset_config", "BlueprintGenerator", "ConfigSanitizer", "add_config_arguments",
    "generate_controlnet_subsets_config_by_subdirs", "generate_dataset_group_by_blueprint",
    "generate_dreambooth_subsets_config_by_subdirs", "load_user_config",
))

REQUIRED = {"DB": ("image_dir",), "FT": ("metadata_file",), "CN": ("image_dir", "conditioning_data_dir")}
KIND_NAMES = {
    "DB": "folders with caption files", "FT": "metadata files", "CN": "folders with masks or control images",
    CONTROL: "folders with control images",
}  # fmt: skip
SUBSET_FIELDS = tuple(f.name for f in dataclasses.fields(SubsetParams) if f.name in KEYS)
DATASET_FIELDS = tuple(f.name for f in dataclasses.fields(DatasetParams) if f.name in KEYS)
PLACEHOLDER_RESOLUTION = (512, 512)


@dataclass(frozen=True)
class Blueprint:
    """All datasets of a run with every setting resolved. `partial`: some settings were refused (see
    DatasetConfigError)."""

    datasets: tuple[DatasetParams, ...]
    used_config_file: bool
    config_path: Path | None = None
    warnings: tuple[str, ...] = ()
    """to be logged once, by the main process; a scan hands them on"""
    is_partial: bool = False
    shadowed: frozenset[str] = frozenset()
    """options that mean nothing, because every dataset or subset has the setting itself"""


class DatasetConfigError(ConfigError):
    """All problems of a dataset configuration. `partial` is the blueprint without what was refused, for further
    checks."""

    def __init__(self, errors: Sequence[ConfigProblem], partial: Blueprint | None = None) -> None:
        self.errors = tuple(errors)
        self.partial = partial
        super().__init__([str(error) for error in errors])


@dataclass(frozen=True)
class ScriptRules:
    """Which kinds of dataset a script takes. `masks`: CN datasets too, with --masked_loss; else their conditioning
    images are control pictures. `dropout`: caption dropout keys."""

    kinds: frozenset[str] = frozenset({"DB", "FT"})
    masks: bool = True
    dropout: bool = True

    def keys_of(self, kind: str) -> frozenset[str]:
        """For whom keys may be that stand in a dataset of a kind."""
        return frozenset({kind, CONTROL} if kind == "CN" and not self.masks else {kind})

    @property
    def keys(self) -> frozenset[str]:
        """The same of all kinds that the script takes."""
        return self.kinds.union(*map(self.keys_of, self.kinds))


_TEXTUAL_INVERSION = ScriptRules(dropout=False)
_CONTROL_NET = ScriptRules(frozenset({"CN"}), masks=False)
SCRIPT_RULES: dict[str, ScriptRules] = {
    "train_db": ScriptRules(frozenset({"DB"})),
    "fine_tune": ScriptRules(frozenset({"FT"}), masks=False),
    "train_textual_inversion": _TEXTUAL_INVERSION,
    "train_textual_inversion_XTI": _TEXTUAL_INVERSION,
    "sdxl_train_textual_inversion": _TEXTUAL_INVERSION,
    "train_control_net": _CONTROL_NET,
    "train_controlnet": _CONTROL_NET,
    "sdxl_train_control_net": _CONTROL_NET,
    "sdxl_train_control_net_lllite": _CONTROL_NET,
    "sdxl_train_control_net_lllite_old": _CONTROL_NET,
    "flux_train_control_net": _CONTROL_NET,
}
"""scripts that differ from the rule: folders and metadata files, masks with --masked_loss, caption dropout"""


def rules_of(
    script: str | ScriptRules, options: DatasetOptions, supports_cn: bool | None = None,
    supports_dropout: bool | None = None
) -> ScriptRules:
    """The rules of a script, by its name or as they are, with masks settled: CN is among the kinds or not."""
    rules = script if isinstance(script, ScriptRules) else SCRIPT_RULES.get(script.removesuffix(".py"), ScriptRules())
    with_cn = "CN" in rules.kinds or (rules.masks and options.masked_loss) if supports_cn is None else supports_cn
    kinds = rules.kinds | {"CN"} if with_cn else rules.kinds - {"CN"}
    return ScriptRules(kinds, rules.masks, rules.dropout if supports_dropout is None else supports_dropout)


def load_blueprint(
    options: DatasetOptions,
    caching: CachingOptions | None = None,
    *,
    explicit: frozenset[str] = frozenset(),
    architecture: DataArchitecture,
    script: str | ScriptRules = "train_network",
    supports_cn: bool | None = None,
    supports_dropout: bool | None = None,
    content: Mapping[str, Any] | None = None,
    native: NativeSizes | None = None,
) -> Blueprint:
    """Read the dataset configuration, or the folder options that stand for one, and resolve every setting.

    `content` is the parsed configuration where the caller has it already. `explicit` are the options that the user
    wrote; `script` decides the kinds of dataset (`supports_cn`, `supports_dropout` override its rules). With `native`
    pictures keep their sizes, and settings of buckets have no effect. Files named in the configuration are not looked
    at; that is the scan's part. Raises DatasetConfigError with all problems.
    """
    problems, warnings = ProblemList(), []
    rules = rules_of(script, options, supports_cn, supports_dropout)
    has_file = content is not None or options.dataset_config is not None
    if content is not None:
        raw = content
    elif options.dataset_config is not None:
        raw = read_config_file(Path(options.dataset_config))
        ignored = [f"--{name}" for name in FOLDER_OPTIONS if getattr(options, name) is not None]
        if ignored:
            warnings.append(
                f"--dataset_config is used, so {', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} ignored"
            )
    else:
        raw = config_from_options(options, problems, warnings, kinds=rules.kinds)
        if problems.items and not raw["datasets"][0]["subsets"]:
            raise DatasetConfigError(problems.items)
    if options.caption_extention is not None and {"caption_extension", "caption_extention"} <= explicit:
        warnings.append(f"--caption_extention {options.caption_extention} is used, --caption_extension is not")
    reader = ConfigReader(
        problems, kinds=rules.keys, supports_dropout=rules.dropout, learns_videos=learns_videos(architecture)
    )
    tables = reader.read(with_new_names(raw, warnings))
    resolver = _Resolver(
        options, caching or CachingOptions(), explicit, architecture, rules, problems, warnings, native=native
    )
    datasets = tuple(resolver.dataset(tables, dataset) for dataset in tables.datasets)
    check_shared_caches(datasets, tables.datasets, architecture, problems)
    warnings += idle_bucket_settings(tables, explicit) if native is None else []
    if options.masked_loss and not any(d.kind == "CN" or any(s.alpha_mask for s in d.subsets) for d in datasets):
        warnings.append(
            "--masked_loss is on, and no dataset has conditioning_data_dir or alpha_mask: the loss is not masked"
        )
    blueprint = Blueprint(
        datasets, has_file, options.dataset_config, tuple(warnings), bool(problems.items), resolver.shadowed()
    )
    if problems.items:
        raise DatasetConfigError(problems.items, blueprint)
    for line in notices(datasets):
        logger.info("%s", line)
    return blueprint


@dataclass
class _Resolver:
    """Turns checked tables into parameters, one dataset after the other."""

    options: DatasetOptions
    caching: CachingOptions
    explicit: frozenset[str]
    architecture: DataArchitecture
    rules: ScriptRules
    problems: ProblemList
    warnings: list[str]
    scopes: list[tuple[Sequence[str], Scope]] = field(default_factory=list)
    """names and where they were looked up, of every dataset and subset"""
    native: NativeSizes | None = None

    def shadowed(self) -> frozenset[str]:
        """Options that no dataset and no subset took."""
        names = {(name, KEYS[name].option) for keys, _ in self.scopes for name in keys if KEYS[name].option}
        taken = {option for name, option in names if any(
            name in keys and scope.takes_option(name) for keys, scope in self.scopes
        )}
        return frozenset(str(option) for _, option in names) - taken

    def dataset(self, tables: ConfigTables, dataset: DatasetTables) -> DatasetParams:
        scope = self._scope(dataset, dataset.table, tables.general)
        kinds = self._kinds(dataset)
        kind = kinds[0] if len(set(kinds)) == 1 else "DB"
        check_sources(dataset, self.architecture, self.problems)
        values = {name: scope.get(name) for name in DATASET_FIELDS}
        self.scopes.append((DATASET_FIELDS, scope))
        values |= self._buckets(dataset, scope, values)
        if len(set(kinds)) <= 1:
            self._check_keys(dataset.table, kind)
        values["resolution"] = values["resolution"] or PLACEHOLDER_RESOLUTION
        params = DatasetParams(
            kind=kind, holds_control=CONTROL in self.rules.keys_of(kind), label=dataset.table.path,
            **_without_bad(values, DatasetParams),
        )
        subsets = [
            self._subset(self._scope(dataset, table, *scope.tables), params, own_kind, dataset.is_flat)
            for table, own_kind in zip(dataset.subsets, kinds)
        ]
        repeated = same_sources(subsets, [table.path for table in dataset.subsets], self.problems, self.warnings)
        kept = tuple(subset for index, subset in enumerate(subsets) if index not in repeated)
        return dataclasses.replace(params, subsets=kept)

    def _scope(self, dataset: DatasetTables, *tables: Table) -> Scope:
        scope = Scope(self.options, *tables)
        return FlatScope(self.explicit, scope) if dataset.is_flat else scope

    def _buckets(self, dataset: DatasetTables, scope: Scope, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of buckets as they count, checked."""
        if self.native is not None:
            if not dataset.is_flat:  # these have one, of any sides
                check_resolution(scope, self.architecture, self.problems)
            self.warnings += idle_beside_native(dataset)
            return {
                "enable_bucket": True, "bucket_rule": RULE, "bucket_reso_steps": self.native.step, "native": self.native
            }
        if dataset.is_flat:
            if values["enable_bucket"] is True:
                check_area(scope, self.architecture, self.problems)
            else:
                check_resolution(scope, self.architecture, self.problems)
            return {"bucket_rule": FLAT_BUCKETS, "bucket_reso_steps": self.architecture.bucket_step}
        check_resolution(scope, self.architecture, self.problems)
        follows = checked_limits(scope, self.explicit, self.problems)
        limits = ("min_bucket_reso", "max_bucket_reso")
        is_limited = any(name in self.explicit or scope.written_at(name) for name in limits)
        if is_limited and values["bucket_no_upscale"] is True and values["enable_bucket"] is True:
            self.warnings.append(
                f"{dataset.table.path}: bucket_no_upscale is on, so {' and '.join(limits)} have no effect"
            )
        return {} if follows is None else {"max_bucket_reso": follows}

    def _subset(self, scope: Scope, dataset: DatasetParams, kind: str, is_flat: bool) -> SubsetParams:
        table = scope.tables[0]
        self.scopes.append((SUBSET_FIELDS, scope))
        self._check_keys(table, kind)
        has_source = is_flat or any(name != "metadata_file" for name in sources_of(table))
        for name in REQUIRED[kind]:
            if name not in table.values and not (name == "image_dir" and has_source):
                self.problems.add(table.where(name), "missing", _missing_message(name, kind, self.rules))
        values = {}
        for name in SUBSET_FIELDS:
            key = KEYS[name]
            values[name] = scope.get(name) if key.kinds & self.rules.keys_of(kind) else key.default
        values["custom_attributes"] = scope.merged("custom_attributes")
        if isinstance(values["caption_extension"], str) and not is_flat:
            values["caption_extension"] = dotted(values["caption_extension"])
        values |= {"whole_captions": is_flat, **source_settings(scope, self.architecture)}
        subset = SubsetParams(label=table.path, **_without_bad(values, SubsetParams))
        check_subset(scope, subset, dataset, self.caching, self.problems)
        check_targets(scope, subset, self.architecture, self.problems)
        self.warnings += told(scope, subset, self.architecture)
        if subset.num_repeats == 0:
            self.warnings.append(f"{table.path} has num_repeats = 0 and is not used")
        return subset

    def _check_keys(self, table: Table, kind: str) -> None:
        """Keys that have no meaning for this kind of dataset. A refused value was reported already."""
        for name, value in table.values.items():
            if KEYS[name].kinds & self.rules.keys_of(kind) or value is BAD:
                continue
            if name == "conditioning_data_dir":
                self.problems.add(
                    table.where(name), "conflict", "masks need the option --masked_loss; add it, or remove this key"
                )
                continue
            wanted = " or ".join(KIND_NAMES[other] for other in sorted(KEYS[name].kinds - {CONTROL}))
            self.problems.add(
                table.where(name), "conflict", f"the key is for {wanted}; this dataset is made of {KIND_NAMES[kind]}"
            )

    def _kinds(self, dataset: DatasetTables) -> list[str]:
        """The kind of each subset; all equal unless kinds are mixed, which is noted as a problem."""
        if len(self.rules.kinds) == 1:
            return list(self.rules.kinds) * len(dataset.subsets)
        masked = ["conditioning_data_dir" in table.values for table in dataset.subsets]
        listed = ["metadata_file" in table.values for table in dataset.subsets]
        mixes_listed = "FT" in self.rules.kinds and any(listed) and not all(listed)
        where = f"{dataset.table.path}.subsets"
        if "CN" in self.rules.kinds and any(masked):
            if all(masked):
                return ["CN"] * len(masked)
            self.problems.add(
                where,
                "conflict",
                "mask and plain subsets cannot share a dataset; put each kind in its own [[datasets]]",
            )
            return ["CN" if mask else "FT" if entry else "DB" for mask, entry in zip(masked, listed)]
        if mixes_listed:
            self.problems.add(
                where,
                "conflict",
                "subsets with and without metadata_file cannot be mixed in the same dataset; put each kind in its own "
                "[[datasets]]",
            )
        if "FT" not in self.rules.kinds:
            return ["DB"] * len(listed)
        return ["FT" if entry else "DB" for entry in listed]


def _missing_message(name: str, kind: str, rules: ScriptRules) -> str:
    if len(rules.kinds) == 1:
        return f"the subset has no {name}; this script trains with {KIND_NAMES[kind]}"
    return f"the subset has no {name}"


def _without_bad(values: dict[str, Any], record: type) -> dict[str, Any]:
    """Refused values are left to the record's defaults (and None, where the record has none)."""
    optional = {f.name: f.default for f in dataclasses.fields(record)}
    result = {}
    for name, value in values.items():
        if value is BAD:
            value = PLACEHOLDER_RESOLUTION if name == "resolution" else optional.get(name)
        result[name] = value
    return result


__all__ = [
    "SCRIPT_RULES", "Blueprint", "ConfigProblem", "DatasetConfigError", "ScriptRules", "load_blueprint",
    "read_config_file", "rules_of",
]
