"""What scripts of flow models are asked about their steps: the sampler and the noise levels. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError, problems_of
from library.core.options import option
from library.training.inference_samplers import (
    FLOW_SAMPLER_NAMES,
    SAMPLER_HELP,
    SD_SIGMA_TABLES,
    SIGMA_TABLES,
    check_flow_sampler,
    check_sampler,
    check_sd_table,
    check_sigma_table,
)
from library.training.sampling_prompts import LineOption

SOLVERS = {
    "unipc": "unipc", "dpm++": "dpmsolver++", "vanilla": "euler", "dpm++sde": "dpmsolver++_sde", "lcm": "lcm",
    "er_sde": "er_sde", "dpmpp_3m_sde": "dpmpp_3m_sde",
}  # fmt: skip
"""names of --sample_solver, the first three those of the known script -> names of the samplers here"""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps"""

    sigma_table: str | None = option(
        None, help="noise levels of the steps, at the family's own shift: " + ", ".join(SIGMA_TABLES.names())
        + SAMPLER_HELP + "; the family's own spacing when not given",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if problems := self.step_problems():
            raise ConfigError(problems)

    def step_problems(self) -> list[str]:
        return problems_of(lambda: check_sigma_table(self.sigma_table, "--sigma_table"))

    def request_fields(self) -> dict[str, Any]:
        return {"sigma_table": self.sigma_table}


@dataclass(frozen=True, kw_only=True)
class SamplerStepOptions(StepOptions):
    """Steps"""

    sampler: str | None = option(
        None, help="how a step is made: " + ", ".join(FLOW_SAMPLER_NAMES) + SAMPLER_HELP + "; euler when not given"
    )

    def step_problems(self) -> list[str]:
        chosen = self.sampler
        found = [] if chosen is None else problems_of(lambda: check_flow_sampler(chosen, "--sampler"))
        return super().step_problems() + found

    def request_fields(self) -> dict[str, Any]:
        return {**super().request_fields(), "sampler": self.sampler}


@dataclass(frozen=True, kw_only=True)
class UNetStepOptions:
    """Steps"""

    sigma_table: str | None = option(
        None, choices=SD_SIGMA_TABLES, help="noise levels of the steps, over those of the training; those of the"
        " sampler when not given",
    )  # fmt: skip

    def request_fields(self) -> dict[str, Any]:
        return {"sigma_table": self.sigma_table}


STEP_GROUPS = (StepOptions, SamplerStepOptions, UNetStepOptions)
"""of which a script has one"""


def read_sampler(text: str) -> str:
    """The name of a sampler that flow models have."""
    return _checked(check_flow_sampler, text)


def read_sigma_table(text: str) -> str | None:
    """The name of a table; `-` stands for the family's own spacing."""
    return None if text == "-" else _checked(check_sigma_table, text)


def read_any_sampler(text: str) -> str:
    """The name of a sampler that SD models have."""
    return _checked(check_sampler, text)


def read_sd_table(text: str) -> str | None:
    """The name of a table that SD models have; `-` stands for the sampler's own levels."""
    return None if text == "-" else _checked(check_sd_table, text)


def _checked(check: Any, text: str) -> str:
    try:
        check(text, "it")
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


STEP_LINES: Mapping[str, LineOption] = {
    "ss": LineOption("sampler", read_sampler), "sg": LineOption("sigma_table", read_sigma_table)
}
"""letters of prompt lines"""
UNET_STEP_LINES: Mapping[str, LineOption] = {
    "ss": LineOption("sampler", read_any_sampler), "sg": LineOption("sigma_table", read_sd_table)
}
"""those of SD models"""
