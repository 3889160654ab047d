"""The tasks of Wan: which model each needs, what it is conditioned on, and how clips are made with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
SCENE_CUT = "镜头切换，"
"""what stands before it where first and last frame are given"""
SMALL_SHIFT = 3.0
"""flow shift of Wan 2.1 with a first frame at 832x480 and 480x832"""
SMALL_SIZES = frozenset({(832, 480), (480, 832)})
LATENT_CHANNELS, MASK_CHANNELS = 16, 4


@dataclass(frozen=True, kw_only=True)
class WanTask:
    """One task. `model_type`: t2v, i2v (something stands beside the latents) or flf2v; `boundary`: the noise level
    from which the second expert takes over, None where there is one model; `guidance`: of the model, or of the experts
    for little and for much noise; `takes_picture`: a first frame is part of it, `takes_last` a last one too."""

    name: str
    dim: int = 5120
    ffn_dim: int = 13824
    heads: int = 40
    layers: int = 40
    in_dim: int = 16
    model_type: str = "t2v"
    takes_picture: bool = False
    takes_last: bool = False
    fun_control: bool = False
    boundary: float | None = None
    shift: float = 5.0
    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)
    frames: int = 81

    @property
    def is_22(self) -> bool:
        """Wan 2.2: two experts and no vision encoder."""
        return self.boundary is not None

    @property
    def needs_vision(self) -> bool:
        """Whether the model looks at the states of a vision encoder."""
        return self.takes_picture and not self.is_22

    @property
    def negative_prompt(self) -> str:
        return SCENE_CUT + NEGATIVE_PROMPT if self.takes_last else NEGATIVE_PROMPT

    def flow_shift(self, width: int, height: int) -> float:
        """The usual one for clips of this size."""
        small = self.takes_picture and not self.takes_last and not self.is_22 and (width, height) in SMALL_SIZES
        return SMALL_SHIFT if small else self.shift

    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(min_timestep, max_timestep) of the expert for little and of that for much noise; None of one model."""
        if self.boundary is None:
            return None
        middle = round(self.boundary * 1000)
        return (0, middle), (middle, 1000)


_SMALL = {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30}
_CONTROL = {"in_dim": 48, "model_type": "i2v", "fun_control": True}
_PICTURE = {"in_dim": 36, "model_type": "i2v", "takes_picture": True, "steps": 40}

TASKS: Mapping[str, WanTask] = {
    task.name: task
    for task in (
        WanTask(name="t2v-14B"),
        WanTask(name="t2v-1.3B", **_SMALL),
        WanTask(name="i2v-14B", **_PICTURE),
        WanTask(name="t2i-14B", frames=1),
        WanTask(name="flf2v-14B", **{**_PICTURE, "model_type": "flf2v", "takes_last": True}),
        WanTask(name="t2v-1.3B-FC", **_SMALL, **_CONTROL),
        WanTask(name="t2v-14B-FC", **_CONTROL),
        WanTask(name="i2v-14B-FC", **{**_PICTURE, **_CONTROL}),
        WanTask(name="t2v-A14B", boundary=0.875, shift=12.0, steps=40, guidance=(3.0, 4.0)),
        WanTask(name="i2v-A14B", boundary=0.900, guidance=(3.5, 3.5), **_PICTURE),
    )
}
DEFAULT_TASK = "t2v-14B"


def boundary_of(value: float) -> float:
    """The boundary as a noise level of a number in either unit: those above 1 are thousandths."""
    return value / 1000 if value > 1 else value


def is_high_noise(sigma: float, boundary: float) -> bool:
    """Whether the expert for much noise predicts at this noise level."""
    return sigma >= boundary


def task_of_caches(*, first_frame: bool, vision: bool, control: bool = False) -> str:
    """The task whose conditions the cache tools of the known trainer make with --i2v, --clip and control clips."""
    if control:
        return "i2v-14B-FC" if first_frame or vision else "t2v-14B-FC"
    if vision:
        return "i2v-14B"
    return "i2v-A14B" if first_frame else DEFAULT_TASK
