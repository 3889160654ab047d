"""What a network needs around the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import CheckpointError
from library.core.keyed_random import StepDraws
from library.training.hooks.base import Hook

if TYPE_CHECKING:
    from library.dataset.batch import Batch
    from library.training.protocols import StateValue
    from library.training.run import Run
    from library.training.trainables.network import NetworkTrainable
    from networks.kinds.ggpo import Ggpo


KEPT = "untrained layers"


class NetworkHook(Hook):
    """Passes the border of an epoch and the multiplier of a batch on to the network, and keeps what GGPO knows of
    gradients over a resume."""

    def __init__(self, trainable: NetworkTrainable) -> None:
        self.trainable = trainable

    def on_epoch_start(self, run: Run) -> None:
        self.trainable.network.on_epoch_start(run.models.text_encoders, run.models.denoiser)

    def on_step_start(self, run: Run, batch: Batch) -> None:
        self.trainable.use_multipliers(batch)
        if (
            len(batch) == 0
        ):  # the step leaves such a batch out, and this rank has to know which parameters the others train
            self.trainable.on_step_start(StepDraws(run.step.seed, batch.request.step, ()))

    def _ggpo(self) -> dict[str, Ggpo]:
        loras = getattr(self.trainable.network, "loras", [])
        return {lora.lora_name: lora.ggpo for lora in loras if getattr(lora, "ggpo", None) is not None}

    def state_dict(self) -> dict[str, StateValue]:
        kept = sorted(self.trainable.kept.layers) if self.trainable.kept.are_written else []
        return {**{name: ggpo.state() for name, ggpo in self._ggpo().items()}, **({KEPT: kept} if kept else {})}

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        kept = self.trainable.kept
        if state.get(KEPT) and not (kept.are_written and sorted(kept.layers) == state[KEPT]):
            raise CheckpointError(
                f"the run of the state keeps {len(state[KEPT])} untrained layers of its --network_weights (first: "
                f"{state[KEPT][0]}); resume with the"
                " same --network_weights and without --drop_untrained"
            )
        device = next(self.trainable.network.parameters()).device
        for name, ggpo in self._ggpo().items():
            ggpo.load_state(state.get(name, {}), device)
