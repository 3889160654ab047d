"""Whether files of Wan belong together: the task and the denoiser, the two experts, encoders and autoencoder. Headers
only."""

from __future__ import annotations

import dataclasses
import os

from library.checkpoints.kinds import check_slot
from library.components.llama_clip_utils import WIDTH, Size
from library.components.wan_vae_utils import inspect_wan_vae
from library.core.errors import ConfigError
from library.families.wan_tasks import TASKS, WanTask
from library.wan_clip_utils import inspect_vision
from library.wan_models import WanParams
from library.wan_text_encoder_utils import inspect_umt5
from library.wan_utils import inspect_wan


def fitting_tasks(params: WanParams) -> tuple[WanTask, ...]:
    """The tasks that a denoiser of these sizes can have; the usual one first. Models of sizes that were never released
    have those of any size."""
    sizes = {task.dim for task in TASKS.values()}
    found = [
        task
        for task in TASKS.values()
        if task.in_dim == params.in_dim and (params.dim == task.dim or params.dim not in sizes)
    ]
    if params.in_dim == TASKS["i2v-14B"].in_dim:
        found = [task for task in found if task.needs_vision == params.has_vision]
        found.sort(key=lambda task: task.takes_last != bool(params.img_positions))
    return tuple(found)


def check_task(given: str | None, params: WanParams, path: str | os.PathLike) -> None:
    """ConfigError where the denoiser at `path` cannot have the task `given`, or, None, has none."""
    fitting = [task.name for task in fitting_tasks(params)]
    if given in fitting or (given is None and fitting):
        return
    branch = "an" if params.has_vision else "no"
    needed = f"--task {' or '.join(fitting)}" if fitting else "another file: no task has such a model"
    raise ConfigError(
        f"{'' if given is None else f'--task is {given}; '}the denoiser {path} has {params.in_dim} input channels,"
        f" {branch} image branch and a width of {params.dim}: needed: {needed}"
    )


def check_second_expert(
    path: str | os.PathLike | None, task: WanTask, boundary: float | None, params: WanParams, first: str | os.PathLike
) -> None:
    """ConfigError where the file of the expert for much noise is none, has no boundary, is `first` itself, or is no
    pair with it, which has `params`."""
    if path is None:
        return
    problem = check_slot(path, "dit_high_noise", {"wan"})
    if problem is not None:
        raise ConfigError(problem)
    if boundary is None:
        raise ConfigError(
            f"--dit_high_noise is given with the task {task.name}, which has one model: needed: a task of Wan 2.2"
            " (--task t2v-A14B or i2v-A14B), or the noise level at which it takes over (--timestep_boundary 0.9)"
        )
    if os.path.exists(first) and os.path.samefile(path, first):
        raise ConfigError(
            f"--dit_high_noise is {path}, which is the file of --dit too; needed: the expert for much noise there, the one"
            " for little noise in --dit"
        )
    other = inspect_wan(path).params
    if other != params:
        names = [name for name in dataclasses.asdict(params) if getattr(params, name) != getattr(other, name)]
        told = ", ".join(f"{name} {getattr(params, name)} and {getattr(other, name)}" for name in names)
        raise ConfigError(f"--dit {first} and --dit_high_noise {path} are no pair: they have {told}")


def part_sizes(
    params: WanParams, *, t5: str | None = None, vae: str | None = None, clip: str | None = None
) -> list[Size]:
    """Sizes of the parts whose files are given, beside those that the denoiser takes."""
    found: list[Size] = []
    if t5 is not None:
        found.append(("t5", t5, WIDTH, lambda: inspect_umt5(t5)["d_model"], params.text_dim))
    if vae is not None:
        channels = "its number of latent channels"
        found.append(("vae", vae, channels, lambda: inspect_wan_vae(vae).params.z_dim, params.out_dim))
    if clip is not None and params.has_vision:
        found.append(("clip", clip, WIDTH, lambda: inspect_vision(clip).values["width"], params.img_dim))
    return found
