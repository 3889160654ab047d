"""The request of a clip of Wan."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError
from library.generation.requests import SampledRequest
from library.generation.video_requests import VideoRequest

SOLVERS = {"unipc": "unipc", "dpm++": "dpmsolver++", "vanilla": "euler"}
"""names of --sample_solver in the known script -> names of the samplers here"""


@dataclass(frozen=True, kw_only=True)
class WanRequest(VideoRequest, SampledRequest):
    """A clip of Wan. `cfg_scale_high_noise`: guidance of the expert for much noise, None: `cfg_scale`; `flow_shift`
    None: that of the task."""

    sampler: str = SOLVERS["unipc"]
    cfg_scale_high_noise: float | None = None

    @property
    def negative_text(self) -> str | None:
        scales = (self.cfg_scale, self.cfg_scale_high_noise)
        return None if all(scale in (None, 1.0) for scale in scales) else self.negative_prompt or ""


def parse_one_frame(text: str, option: str) -> tuple[tuple[int, ...], int]:
    """(places of the control pictures, place of the frame) of a comma list control_index=a;b,target_index=c;
    `default` stands for nothing. ConfigError."""
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        if name != "default":
            found[name.strip()] = value.strip()
    unknown = sorted(found.keys() - {"control_index", "target_index"})
    try:
        controls = tuple(int(number) for number in found.get("control_index", "0").split(";"))
        target = int(found.get("target_index", "1"))
    except ValueError:
        unknown.append(text)
    if unknown:
        raise ConfigError(
            f"{option} is '{text}', of which {', '.join(unknown)} is not understood; needed:"
            " control_index=0;10,target_index=1, say"
        )
    return controls, target
