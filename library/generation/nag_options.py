"""Normalised attention guidance: what scripts are asked about it. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.core.options import option
from library.training.sampling_prompts import LineOption, read_not_negative, read_text

NAG_FIELDS = ("nag_scale", "nag_tau", "nag_alpha", "nag_prompt")
"""options, and fields of a request of the same names"""


@dataclass(frozen=True, kw_only=True)
class NagOptions:
    """Guidance inside the attention to the text"""

    nag_scale: float | None = option(
        None, least=0, help="normalised attention guidance: how far attention to the prompt goes away from that to the"
        " negative prompt, in the forward for the prompt, also without --guidance_scale; 3 is usual",
    )  # fmt: skip
    nag_tau: float = option(3.5, least=0, help="how much longer than without it the result may be")
    nag_alpha: float = option(0.5, least=0, help="share of the result, the rest is as without it; above 1 overshoots")
    nag_prompt: str | None = option(None, help="text that it leads away from; the negative prompt when not given")

    def request_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAG_FIELDS}


NAG_LINES: Mapping[str, LineOption] = {
    "ns": LineOption("nag_scale", read_not_negative), "nt": LineOption("nag_tau", read_not_negative),
    "na": LineOption("nag_alpha", read_not_negative), "np": LineOption("nag_prompt", read_text),
}  # fmt: skip
"""letters of prompt lines"""
