"""Tells InfoNoise the losses of the samples, and has it renew its density."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.device_utils import to_device
from library.training.hooks.base import Hook
from library.training.timestep_samplers.info_noise import InfoNoise, data_factor, info_noise_sampler, log_ratios
from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions

if TYPE_CHECKING:
    from library.dataset.batch import Batch
    from library.training.objective import NoisyLatents
    from library.training.protocols import Logs, StateValue
    from library.training.run import DiTOutput, Run
    from library.training.step import TrainStep

logger = logging.getLogger(__name__)
MOST_SHAPES = 64
"""of latents, whose law of the warm-up is looked at: pictures at their own sizes may have thousands"""


class InfoNoiseHook(Hook):
    """Losses stay on the device, those of all processes, until the density is renewed or a state is written: then they
    are read at once. Regularisation images do not count."""

    state_key = "InfoNoise"

    def __init__(self, options: InfoNoiseOptions) -> None:
        super().__init__(options)
        self.info: InfoNoise | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._of_step: list[torch.Tensor] = []
        self._unread: list[torch.Tensor] = []

    def on_train_start(self, run: Run) -> None:
        sampler = info_noise_sampler(run.step.timestep_sampler)
        self.info = sampler.info
        self.info.warm_up = self.opts.warm_up(run.progress.max_train_steps)
        latents = run.family.architecture.latents
        buckets = list(dict.fromkeys(item.bucket for item in run.data.train.items)) or [(1024, 1024)]
        shapes = some_of([latents.latent_shape(bucket) for bucket in buckets])
        self.info.know_law(sampler.law, shapes, sampler.objective)
        if self._loaded is not None:
            self.info.load_state_dict(self._loaded)

    def on_prediction(self, step: TrainStep, output: DiTOutput, sample: NoisyLatents, batch: Batch) -> None:
        error = output.pred.detach().float() - output.target.detach().float()
        error = error.square().flatten(1).mean(dim=1)  # [B]
        ratios = log_ratios(sample.noisiest_timesteps, step.objective)  # [B]
        counts = batch.are_reg or [False] * len(batch)
        places = [math.nan if is_reg else place for place, is_reg in zip(batch.request.positions, counts)]
        places = to_device(torch.tensor(places, dtype=torch.float32), error.device)
        self._of_step.append(torch.stack([places, ratios, error * data_factor(ratios, step.objective)], dim=1))

    def on_post_optimizer_step(self, run: Run) -> None:
        rows = torch.cat(self._of_step) if self._of_step else torch.empty(0, 3, device=run.runtime.device)  # [N, 3]
        self._of_step = []
        self._unread.append(_of_all_processes(rows, run))
        step = run.progress.global_step
        if self.info.is_due(step):
            was_ready = self.info.is_ready
            self._read()
            status = self.info.renew(step)
            if self.info.is_ready and not was_ready:
                logger.info("InfoNoise: noise levels follow the losses from step %d on", step + 1)
            elif status != "ok":
                logger.debug("InfoNoise at step %d: %s", step, status)

    def _read(self) -> None:
        """The losses that wait, in the order of steps and places, with one copy from the device."""
        if not self._unread:
            return
        numbers, counts = torch.cat(self._unread).cpu(), [len(rows) for rows in self._unread]
        self._unread = []
        for rows in numbers.split(counts):
            rows = rows[rows.isfinite().all(dim=1)]
            rows = rows[rows[:, 0].argsort(stable=True)]
            self.info.record(rows[:, 1], rows[:, 2])

    def extra_step_logs(self, run: Run) -> Logs:
        return {
            "infonoise/cdf_ready": float(self.info.is_ready),
            "infonoise/refresh_degraded_count": float(self.info.degraded),
        }

    def state_dict(self) -> dict[str, StateValue]:
        if self.info is None:
            return {}
        self._read()
        return self.info.state_dict()

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self._loaded = state or None


def _of_all_processes(rows: torch.Tensor, run: Run) -> torch.Tensor:
    """Rows [N, 3] of every process, filled up with NaN to as many as the largest step has."""
    if run.runtime.num_processes == 1:
        return rows
    most = run.data.samples_per_step
    filled = torch.full((most, 3), math.nan, device=rows.device)
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in range(run.runtime.num_processes)]
    torch.distributed.all_gather(parts, filled)
    return torch.cat(parts)


def some_of(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes [C, ..., h, w] as they are, and of very many the smallest, the largest and some evenly between."""
    if len(shapes) <= MOST_SHAPES:
        return list(shapes)
    by_area = sorted(shapes, key=lambda shape: math.prod(shape[-2:]))
    return [by_area[place * (len(shapes) - 1) // (MOST_SHAPES - 1)] for place in range(MOST_SHAPES)]
