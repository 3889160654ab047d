"""From the output of a model to one loss per sample, as the options say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from library.dataset.batch import Batch
from library.training.losses.reduction import loss_mask, per_sample_loss
from library.training.objective import NoisyLatents, Objective
from library.training.run import DiTOutput

if TYPE_CHECKING:
    from library.training.loss_weights import LossFactor
    from library.training.losses import ElementLoss


@dataclass(frozen=True)
class LossFunction:
    """Element-wise loss, weight of the noise level, mask, mean, weight of the sample, SNR factors; in this order.

    `element`: see library/training/losses; `factors`: see library/training/loss_weights, None = none.
    """

    element: ElementLoss
    factors: LossFactor | None
    objective: Objective
    masked_loss: bool = False

    def __call__(self, output: DiTOutput, sample: NoisyLatents, batch: Batch) -> torch.Tensor:
        """Losses [B] in float32."""
        return self.weighed(output, sample.timesteps, self.objective.loss_weight(sample), batch)

    def weighed(
        self, output: DiTOutput, timesteps: torch.Tensor, weight: torch.Tensor | None, batch: Batch
    ) -> torch.Tensor:
        """The same with the weight of the noise level given: as `per_sample_loss` takes it."""
        prediction, target = output.pred.float(), output.target.float()
        return per_sample_loss(
            self.element(prediction, target, timesteps, self.objective),  # [B, C, ...]
            flow_weight=weight,
            mask=loss_mask(
                batch.conditioning_images, batch.alpha_masks, prediction.shape, masked_loss=self.masked_loss
            ),
            sample_weights=batch.loss_weights,
            factors=None if self.factors is None else self.factors(timesteps, self.objective),
        )
