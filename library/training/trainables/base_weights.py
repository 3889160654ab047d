"""--base_weights: adapters that are part of the base model of a run, merged while its files are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.checkpoints.identity import combined_identity, model_identity
from library.checkpoints.kinds import preferred_subfolders
from library.checkpoints.loading import open_checkpoint
from library.core.errors import ConfigError
from library.lora_utils import Adapter, MergeOnLoad, read_adapter
from library.training.adapters import NetworkOptions
from networks.files.network_files import by_module, read_adapter_file
from networks.kinds.registry import kind_of
from networks.kinds.targets import NetworkTargets, targets_of_family

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime
    from library.training.protocols import NetworkModule
    from library.training.run import Models
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)


class BaseWeights:
    """The files of --base_weights with their multipliers."""

    def __init__(self, options: NetworkOptions) -> None:
        multipliers = list(options.base_weights_multiplier or [])
        self.files = [
            (path, multipliers[i] if i < len(multipliers) else 1.0) for i, path in enumerate(options.base_weights or ())
        ]
        self._merge: MergeOnLoad | None = None

    def transform(
        self, family: ModelFamily, model_path: str | None, caches_text: bool, further: Sequence[Adapter] = ()
    ) -> MergeOnLoad | None:
        """What the loaders of the family are given; None when there is nothing to merge. `further` adapters are merged
        as well.

        CheckpointError when a file belongs to another family, ConfigError when one can only be merged after text
        outputs are cached; both are found here, from headers, before anything is cached.
        """
        targets = targets_of_family(family.name)
        for path, multiplier in self.files:
            if caches_text and multiplier and _is_foreign(path, targets) and _changes_text(path, targets):
                raise ConfigError(
                    f"--base_weights {path} is of a kind that only its network module can merge, and it changes text "
                    "encoders, whose"
                    " outputs would be cached before. Leave --cache_text_encoder_outputs out"
                )
        own = [(path, multiplier) for path, multiplier in self.files if not _is_foreign(path, targets)]
        if not own and not further:
            return None
        self._merge = MergeOnLoad(
            targets, [*(read_adapter(path, targets, multiplier) for path, multiplier in own), *further]
        )
        for path, multiplier in own:
            logger.info("base weights: %s with multiplier %g", path, multiplier)
        if model_path:
            places = preferred_subfolders()
            folder = next((places[kind] for kind in family.record.kinds if kind in places), None)
            self._merge.plan(open_checkpoint(model_path, folder)).check_family()
        return self._merge

    def identity(self, targets: NetworkTargets) -> str:
        """Stands for the files that change text encoders, so that outputs cached with others are not taken for
        theirs."""
        parts = []
        for path, multiplier in self.files:
            if multiplier and not _is_foreign(path, targets) and _changes_text(path, targets):
                logger.info(
                    "%s changes text encoders; cached outputs are made with it (other trainers cache those of the "
                    "encoders without it)",
                    path,
                )
                parts.append(f"{model_identity(path)} times {multiplier:g}")
        return combined_identity(parts) if parts else ""

    def finish(self, module: NetworkModule, models: Models, runtime: Runtime, targets: NetworkTargets) -> None:
        """After loading: say what fitted nowhere; files of kinds that only the user's network module knows are merged
        by it."""
        if self._merge is not None:
            self._merge.report()
        for path, multiplier in self.files:
            if not _is_foreign(path, targets):
                continue
            encoders = [encoder for encoder in models.text_encoders if encoder is not None]
            network, weights = module.create_network_from_weights(
                multiplier, path, models.vae, encoders, models.denoiser, weights_sd=read_adapter_file(path, targets),
                for_inference=True
            )
            logger.info("base weights: %s with multiplier %g, merged by %s", path, multiplier, module.__name__)
            network.merge_to(encoders, models.denoiser, weights, runtime.weight_dtype, runtime.device)


def _changes_text(path: str, targets: NetworkTargets) -> bool:
    return any(targets.encoder_of(name) is not None for name in by_module(read_adapter_file(path, targets)))


def _is_foreign(path: str, targets: NetworkTargets) -> bool:
    return any(kind_of(part) is None for part in by_module(read_adapter_file(path, targets)).values())
