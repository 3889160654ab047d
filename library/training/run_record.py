"""What the metadata of a file tells about its run: collected from the Run at each save."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.core.keyed_random import key_seed
from library.sai_model_spec import source_date
from library.training.data_phase import DataGroups
from library.training.metadata import BaseModelHashes, MetadataInputs, at_save, build_metadata
from library.training.optimizers import OptimizerBuild
from library.training.packing_options import packing_metadata
from library.training.run import Run

if TYPE_CHECKING:
    from library.training.protocols import Plain


class RunRecord:
    """`metadata(run)` makes the metadata of a file that is written now. Hashes of the base model are taken in the
    background from the start on, and waited for at the first save. With SOURCE_DATE_EPOCH equal runs write equal
    files."""

    def __init__(self, started_at: float, optimizer: OptimizerBuild, data: DataGroups, hashes: BaseModelHashes) -> None:
        self._source_date = source_date()
        self.started_at = started_at if self._source_date is None else self._source_date
        self.optimizer = optimizer
        self.data = data
        self.hashes = hashes
        self._common: Mapping[str, str] | None = None

    def metadata(self, run: Run) -> dict[str, str]:
        """Of the main process; keys and values are texts."""
        if self._common is None:
            self._common = build_metadata(self._inputs(run))
        # what hooks add may change with each step; with --no_metadata it is not among the keys
        now = {key: str(value) for key, value in self._added(run).items() if key in self._common}
        return at_save(
            {**self._common, **now}, steps=run.progress.global_step, epoch=run.progress.finished_epochs,
            finished_at=time.time() if self._source_date is None else self._source_date, hashes=self.hashes,
        )

    def _session_id(self, seed: int) -> int:
        """Of this run alone; with a source date it follows from the seed."""
        return secrets.randbits(32) if self._source_date is None else key_seed(seed, "session id") % 2**32

    @staticmethod
    def _added(run: Run) -> dict[str, Plain]:
        """What hooks add, as it is now."""
        return {key: value for values in run.hooks.extra_metadata(run) for key, value in values.items()}

    def _inputs(self, run: Run) -> MetadataInputs:
        train, validation, progress = self.data.train, self.data.validation, run.progress
        extra = {**packing_metadata(run.config), **self._added(run)}
        if run.settings.history:
            extra["ss_resume_changes"] = json.dumps(run.settings.history)
        return MetadataInputs(
            config=run.config,
            session_id=self._session_id(run.runtime.seed),
            started_at=self.started_at,
            seed=run.runtime.seed,
            datasets=train.metadata(),
            tag_frequency=train.tag_frequency,
            num_train_images=train.num_train_images,
            num_validation_images=0 if validation is None else validation.num_train_images,
            num_reg_images=train.num_reg_images,
            num_batches_per_epoch=progress.batches_per_epoch,
            num_epochs=progress.num_epochs,
            max_train_steps=progress.max_train_steps,
            num_processes=run.runtime.num_processes,
            optimizer=self.optimizer.metadata_text,
            family=run.family.metadata(),
            modelspec=run.family.modelspec(),
            trainable=run.trainable.metadata(),
            kind=run.trainable.spec_kind,
            has_clips=run.family.architecture.latents.clips,
            extra=extra,
        )
