"""Options of packing, samples of several sizes in one step, and what does not go with it. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Ignored, option, option_fields, without_effect
from library.dataset import DatasetOptions
from library.dataset.native_sizes import NativeSizes
from library.dataset.packing import STRATEGIES, Packing
from library.training.adapters import NetworkOptions
from library.training.computing_options import MemoryOptions

if TYPE_CHECKING:
    from library.core.options import Config
    from library.families.latents import SideLimit
    from library.families.record import DataArchitecture
    from library.training.hooks.base import Hook
    from library.training.protocols import Plain
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

OVER_BUDGET = ("downscale", "fail")
BUCKET_OPTIONS = ("enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
PACKS = ("network", "full")
"""what can be learned from packs"""
OF_SAMPLES = "is drawn for every sample, and the layers see the tokens of all samples of a pack as one row"


@dataclass(frozen=True, kw_only=True)
class NavitOptions:
    """Packing: samples of several sizes in one step."""

    navit_packing: bool = option(
        False, help="NaViT: samples of several sizes go through the denoiser together, as many as a budget of tokens"
        " holds; for transformer families",
    )  # fmt: skip
    navit_token_budget: int = option(
        16384, least=1, help="tokens of pictures or clips in one pack, at most; a picture of 1024x1024 has 4096 in most"
        " families",
    )  # fmt: skip
    navit_max_images_per_pack: int = option(0, least=0, help="samples of one pack, at most; 0 = any number")
    navit_pack_strategy: str = option(
        "next_fit", choices=STRATEGIES, help="next_fit: samples in shuffled order, a new pack where the next does not"
        " fit; ffd: the largest first, each into the first pack that has room",
    )  # fmt: skip
    navit_pack_ffd_window: int = option(256, least=0, help="samples that ffd sorts at a time; 0 = the whole epoch")
    navit_drop_last: bool = option(False, help="leave out the emptiest pack of every epoch of a dataset")
    navit_text_trim_padding: bool = option(
        False, help="cut the texts of each size in a pack to the longest one; for families whose denoiser does not"
        " attend to padding",
    )  # fmt: skip
    navit_native_resolution: bool = option(
        False, help="every picture at its own size, cut to whole steps of the model's grid; settings of buckets have no"
        " effect",
    )  # fmt: skip
    navit_native_over_budget: str = option(
        "downscale", choices=OVER_BUDGET, help="pictures with more tokens than the budget or more pixels a side than"
        " the model takes: downscale, or fail",
    )  # fmt: skip

    @property
    def packing(self) -> Packing | None:
        """How packs are filled; None without packing."""
        if not self.navit_packing:
            return None
        return Packing(
            self.navit_token_budget, self.navit_max_images_per_pack, self.navit_pack_strategy,
            self.navit_pack_ffd_window, self.navit_drop_last,
        )  # fmt: skip


def packing_of(config: Config) -> Packing | None:
    return config[NavitOptions].packing if NavitOptions in config else None


def packing_metadata(config: Config) -> dict[str, Plain]:
    """ss_navit_* keys of a run that packs."""
    if packing_of(config) is None:
        return {}
    return {f"ss_{name}": getattr(config[NavitOptions], name) for name in option_fields(NavitOptions)}


def trims_text(config: Config) -> bool:
    """Whether the texts in packs are cut to the longest."""
    return packing_of(config) is not None and config[NavitOptions].navit_text_trim_padding


def native_sizes(config: Config, architecture: DataArchitecture, limit: SideLimit | None = None) -> NativeSizes | None:
    """How pictures keep their sizes; None where they go into buckets. `limit`: of the family's model."""
    if NavitOptions not in config:
        return None
    options = config[NavitOptions]
    if not (options.navit_packing and options.navit_native_resolution):
        return None
    return NativeSizes(
        latents=architecture.latents, step=architecture.bucket_step, token_budget=options.navit_token_budget,
        side_limit=None if limit is None else limit.pixels, scales=options.navit_native_over_budget == "downscale",
    )  # fmt: skip


def idle_beside_packs(config: Config, family: ModelFamily) -> list[Ignored]:
    """Settings without effect in a run that packs."""
    packing = packing_of(config)
    if packing is None:
        return []
    size = [name for name in ("train_batch_size",) if name in config.explicit]
    window = [name for name in ("navit_pack_ffd_window",) if name in config.explicit and packing.strategy != "ffd"]
    return [
        *without_effect(size, "--navit_token_budget says how many samples a training step has"),
        *without_effect(window, "--navit_pack_strategy is not ffd"),
        *without_effect(
            ["navit_text_trim_padding"] if trims_text(config) and family.ends_texts_together else [],
            f"{family.record.title} pads captions no further than the longest of a batch anyway",
        ),
        *idle_sizes(config),
    ]


def idle_sizes(config: Config) -> list[Ignored]:
    """Settings of sizes without effect, in training or while latents are cached for it."""
    if NavitOptions not in config:
        return []
    options = config[NavitOptions]
    if not options.navit_packing:
        names = [name for name in option_fields(NavitOptions) if name in config.explicit and name != "navit_packing"]
        return without_effect(names, "--navit_packing is not set")
    if not options.navit_native_resolution:
        names = [name for name in ("navit_native_over_budget",) if name in config.explicit]
        return without_effect(names, "--navit_native_resolution is not set")
    names = [name for name in BUCKET_OPTIONS if name in config.explicit]
    return without_effect(names, "with --navit_native_resolution pictures keep their sizes")


def check_packing(config: Config, family: ModelFamily, trainable: Trainable, hooks: Iterable[Hook]) -> None:
    """ConfigError for what cannot be done with packs."""
    if packing_of(config) is None:
        return
    problems = Problems()
    for message in _problems(config, family, trainable):
        problems.add(message)
    for hook in hooks:
        if hook.process_batch is not None:
            name = hook.told_as or type(hook).__name__
            problems.add(
                f"--navit_packing is set and {name} replaces the body of the step, whose batches have one size; take"
                " one of them out"
            )
    problems.raise_if_any()


def _problems(config: Config, family: ModelFamily, trainable: Trainable) -> Iterator[str]:
    if not family.packs():
        yield (
            f"--navit_packing is set, and the denoiser of {family.record.title} takes batches of one size; leave it"
            " out: buckets make such batches"
        )
    elif trims_text(config) and not (family.padded_texts or family.ends_texts_together):
        masking = f", or set --{family.padding_masked_by}" if family.padding_masked_by else ""
        yield (
            f"--navit_text_trim_padding is set, and the denoiser of {family.record.title} attends to the padding of"
            f" captions: without it the prediction would be another; leave it out{masking}"
        )
    if trainable.name not in PACKS:
        yield "--navit_packing is set, and packs are for adapters and whole models; leave it out"
    if config[MemoryOptions].compiles:
        yield (
            "--navit_packing and --torch_compile are set: every pack has lengths of its own, for which blocks would be"
            " compiled again and again; leave one of them out"
        )
    if config[DatasetOptions].dataset_class is not None:
        yield "--navit_packing is set, and --dataset_class makes batches of its own; leave one of them out"
    if NetworkOptions in config:
        yield from _network_problems(config[NetworkOptions])


def _is_off(value: str) -> bool:
    """Whether a dropout of --network_args drops nothing; what is no number is told where arguments are read."""
    try:
        return float(value) == 0
    except ValueError:
        return True


def _network_problems(options: NetworkOptions) -> Iterator[str]:
    """Dropouts and ranks of each sample."""
    if options.network_dropout:
        yield f"--network_dropout is {options.network_dropout}, which {OF_SAMPLES}: leave it or --navit_packing out"
    given = dict(pair.partition("=")[::2] for pair in options.network_args or ())
    for name, value in given.items():
        if name.endswith("dropout") and name != "module_dropout" and not _is_off(value):
            yield f"--network_args {name}={value}: it {OF_SAMPLES}: leave it or --navit_packing out"
    if "tlora" in (options.network_module or "") or given.get("algo", "").lower() == "tlora":
        yield (
            "--navit_packing is set, and T-LoRA trains ranks by the noise level of every sample, where layers see the"
            " tokens of all samples of a pack as one row; use another adapter or leave --navit_packing out"
        )
