"""What scripts are asked about guidance away from the negative prompt, whichever family they are of: the option group,
the schedule of its steps, letters of prompt lines. Without torch; the formulas are in `guidance.py`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, problems_of
from library.core.options import LARGEST_STEPS, option
from library.training.sampling_prompts import LineOption, Whole, read_not_negative, read_number

if TYPE_CHECKING:
    from library.generation.requests import PictureRequest

logger = logging.getLogger(__name__)

SCHEDULE_FORM = "numbers of steps from 1 on, as 5, 1-10 or e~2 (every second one), each with :SCALE behind it or not," \
    " and ! before those that are left out, e.g. e~2:6.4,1-10,!7"  # fmt: skip
_TOKEN = re.compile(
    r"(?P<out>!)?(?:e~(?P<every>[0-9]+)|(?P<first>[0-9]+)(?:-(?P<last>[0-9]+))?)"
    r"(?::(?P<scale>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)))?"
)


@dataclass(frozen=True)
class ScheduledSteps:
    """One piece of a schedule: steps `first` to `last` counted from 1 (None = to the end), every `stride`-th of them.
    `scale` None: that of the request."""

    first: int
    last: int | None
    stride: int = 1
    scale: float | None = None
    left_out: bool = False

    def numbers(self, steps: int) -> range:
        return range(self.first, (steps if self.last is None else self.last) + 1, self.stride)


def read_schedule(text: str) -> tuple[ScheduledSteps, ...]:
    """The pieces of a comma list; ConfigError with every one that is not understood."""
    pieces, problems = [], []
    for token in (part.strip() for part in text.split(",")):
        match = _TOKEN.fullmatch(token)
        if match is None:
            problems.append(f"--cfg_schedule has '{token}'; needed: {SCHEDULE_FORM}")
            continue
        piece = _piece(match)
        if piece.first < 1 or (piece.last is not None and piece.last < piece.first):
            problems.append(f"--cfg_schedule has '{token}'; needed: steps from 1 on, the first one before the last one")
        elif piece.left_out and piece.scale is not None:
            problems.append(f"--cfg_schedule has '{token}'; steps that are left out have no scale, leave it away")
        pieces.append(piece)
    if problems:
        raise ConfigError(problems)
    return tuple(pieces)


def _piece(match: re.Match[str]) -> ScheduledSteps:
    scale = None if match["scale"] is None else float(match["scale"])
    out = match["out"] is not None
    if match["every"] is not None:
        stride = int(match["every"])
        return ScheduledSteps(stride, None, max(stride, 1), scale, out)
    first = int(match["first"])
    return ScheduledSteps(first, int(match["last"] or first), 1, scale, out)


def scheduled_scales(text: str, steps: int, default: float | None = None) -> dict[int, float | None]:
    """Step (from 1 on) -> scale of its guidance, of those steps that are guided; where a piece names no scale it is
    `default`. Later pieces go before earlier ones, and what is left out stays out wherever it stands. ConfigError when
    a piece goes beyond the last step."""
    pieces = read_schedule(text)
    beyond = sorted({piece.last for piece in pieces if piece.last is not None and piece.last > steps})
    if beyond:
        raise ConfigError(
            f"--cfg_schedule names step {', '.join(map(str, beyond))}; there are {steps} steps, numbered from 1 on"
        )
    found: dict[int, float | None] = {}
    for piece in pieces:
        if not piece.left_out:
            found |= dict.fromkeys(piece.numbers(steps), default if piece.scale is None else piece.scale)
    out = {number for piece in pieces if piece.left_out for number in piece.numbers(steps)}
    return {number: scale for number, scale in found.items() if number not in out}


def step_scales(text: str, steps: int) -> list[float | None]:
    """[steps] the scale of each step, None = that of the request, 1 = not guided. ConfigError. The schedule may name
    steps beyond them, which is told: by noise levels (--sigma_table beta, --noise_mode direct) fewer steps are made
    than the request asks for, by which it was checked."""
    most = max(steps, *(piece.last or 0 for piece in read_schedule(text)))
    if most > steps:
        logger.warning("--cfg_schedule names step %d; %d steps are made, by their noise levels", most, steps)
    chosen = scheduled_scales(text, most)
    return [chosen.get(step, 1.0) for step in range(1, steps + 1)]


def asks_guidance(text: str) -> bool:
    """Whether a schedule has a scale of its own other than 1, which guides a request whose scale is 1."""
    try:
        return any(piece.scale not in (None, 1.0) for piece in read_schedule(text))
    except ConfigError:  # told where requests are checked
        return False


# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Guidance away from the negative prompt"""

    cfg_schedule: str | None = option(
        None, metavar="STEPS", help="which steps are guided, and how strongly: comma list of steps from 1 on (5), ranges"
        " (1-10), every n-th (e~2), each with :SCALE where it is another one, and ! before steps that are left out",
    )  # fmt: skip
    cfgzerostar_scaling: bool = option(
        False, help="CFG-Zero*: scale the negative part so that it fits the positive one best"
    )
    cfgzerostar_init_steps: int = option(
        -1, least=-1, most=LARGEST_STEPS,
        help="multiply the prediction of so many first steps by --cfgzerostar_multiplier (2 suits text to video, 1"
        " picture to video); -1 = none",
    )  # fmt: skip
    cfgzerostar_multiplier: float = option(0.0, help="that factor; 0 = these steps change nothing")
    perp_neg: float | None = option(
        None, least=0, help="perpendicular negative prompt: take away this multiple of the part of the negative prompt"
        " that is perpendicular to the prompt; needs a third forward, for an empty prompt. 1.5 to 2 to begin with",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = guidance_problems(self.request_fields())
        if problems:
            raise ConfigError(problems)

    def request_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in GUIDANCE_FIELDS}


GUIDANCE_FIELDS = (
    "cfg_schedule", "cfgzerostar_scaling", "cfgzerostar_init_steps", "cfgzerostar_multiplier", "perp_neg",
)  # fmt: skip
"""options, and fields of a request of the same names"""
NEEDS: Mapping[str, str] = {"cfgzerostar_multiplier": "cfgzerostar_init_steps"}
"""option -> the one without which it has no effect"""
OF_TWO_FORWARDS = ("cfg_schedule", "cfgzerostar_scaling", "perp_neg")
"""options that have no effect where nothing is guided"""


def guidance_problems(values: Mapping[str, Any], steps: int | None = None) -> list[str]:
    """What contradicts itself in settings of these names; with `steps` also a schedule that goes beyond them."""
    problems = []
    schedule = values["cfg_schedule"]
    if schedule is not None:
        problems += problems_of(lambda: scheduled_scales(schedule, LARGEST_STEPS if steps is None else steps))
    if values["perp_neg"] is not None and values["cfgzerostar_scaling"]:
        problems.append(
            "--perp_neg and --cfgzerostar_scaling are both given; each makes its own prediction of both prompts, leave one"
            " out"
        )
    return problems


def request_guidance_problems(request: PictureRequest) -> list[str]:
    """As `guidance_problems`, of a request."""
    return guidance_problems({name: getattr(request, name) for name in GUIDANCE_FIELDS}, request.made_steps)


def idle_guidance(request: PictureRequest, explicit: Sequence[str] | set[str]) -> list[str]:
    """Lines about options of guidance that are written and change nothing in this request."""
    found = [
        f"--{name} has no effect without --{needed}"
        for name, needed in NEEDS.items()
        if name in explicit and getattr(request, needed) < 1
    ]
    if request.negative_text is None:
        reason = "nothing is guided away from a negative prompt (the scale is 1, or there is no such prompt)"
        found += [
            f"--{name} has no effect: {reason}"
            for name in OF_TWO_FORWARDS
            if name in explicit and getattr(request, name) not in (None, False)
        ]
    return found


# -- prompt lines ------------------------------------------------------------------------------------------------------


def read_switch(text: str) -> bool:
    """1 or 0, on or off."""
    known = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}
    if text.lower() not in known:
        raise ValueError("1 or 0 is needed")
    return known[text.lower()]


def read_steps_schedule(text: str) -> str | None:
    """A schedule; `-` stands for none."""
    if text == "-":
        return None
    try:
        read_schedule(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


GUIDANCE_LINES: Mapping[str, LineOption] = {
    "cs": LineOption("cfg_schedule", read_steps_schedule),
    "czs": LineOption("cfgzerostar_scaling", read_switch),
    "czi": LineOption("cfgzerostar_init_steps", Whole(0, LARGEST_STEPS, 2)),
    "czm": LineOption("cfgzerostar_multiplier", read_number),
    "pn": LineOption("perp_neg", read_not_negative),
}
"""letters of a prompt line that every script with these options has"""
