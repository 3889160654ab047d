"""ControlNet-LLLite, small networks inside the denoiser that follow a control picture, is what is learned: options."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import option
from library.families.record import FamilyRecord

DEFAULT_COND_DIM, DEFAULT_DIM = 32, 64


@dataclass(frozen=True, kw_only=True)
class LLLiteOptions:
    """ControlNet-LLLite"""

    cond_emb_dim: int | None = option(
        None, most=4096,
        help=f"channels that the control picture is embedded in; those of --network_weights, else {DEFAULT_COND_DIM}",
    )
    network_dim: int | None = option(
        None, most=4096, help=f"width of the inner layers; that of --network_weights, else {DEFAULT_DIM}"
    )
    network_dropout: float | None = option(None, help="part of the inner values that are dropped while training")
    network_weights: str | None = option(None, help="file of a ControlNet-LLLite to start from")

    def __post_init__(self) -> None:
        problems = Problems()
        if self.cond_emb_dim is not None and (self.cond_emb_dim < 2 or self.cond_emb_dim % 2):
            problems.add(
                f"--cond_emb_dim is {self.cond_emb_dim}; needed: an even number from 2, its first half is used too"
            )
        if self.network_dim is not None and self.network_dim < 1:
            problems.add(f"--network_dim is {self.network_dim}; needed: 1 or more")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            problems.add(f"--network_dropout is {self.network_dropout}; needed: from 0 to below 1")
        problems.raise_if_any()


def foreign_options(record: FamilyRecord, trainable: str) -> dict[str, str]:
    """Shared options that the known scripts do not have: name -> reason."""
    return {"skip_until_initial_step": "a run begins at --initial_step without loading what lies before it"}
