"""How latents are corrupted and what the denoiser has to predict: DDPM noise schedules and flow matching."""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from library.core.keyed_random import StepDraws
from library.device_utils import to_device, to_like
from library.training import timesteps as levels

if TYPE_CHECKING:
    from library.training.option_groups import NoiseOptions
    from library.training.timestep_samplers import TimestepOptions

logger = logging.getLogger(__name__)

FLOW_TARGETS = ("velocity", "reverse_velocity", "latents")
PREDICTION_TYPES = ("epsilon", "v")


@dataclass
class NoisyLatents:
    """A noised micro-batch. `timesteps` are on the 0..1000 scale and `sigmas` (flow: 0 = data, 1 = noise) stay
    float32."""

    latents: torch.Tensor  # [B, C, ...]
    noisy_latents: torch.Tensor  # [B, C, ...]
    noise: torch.Tensor  # [B, C, ...]
    timesteps: torch.Tensor  # [B], [B, F] or [B, tokens] float32, 0..1000
    sigmas: torch.Tensor  # as timesteps
    target: torch.Tensor  # [B, C, ...]
    known_times: torch.Tensor | None = None
    """what `timesteps` are, on the CPU, where they came from there: to be read without waiting for the device"""

    @property
    def noisiest_timesteps(self) -> torch.Tensor:
        """One per sample [B], where frames or tokens have times of their own that of the noisiest: for what depends on how
        much of a sample can be seen (ranks of T-LoRA)."""
        return self.timesteps if self.timesteps.ndim == 1 else self.timesteps.flatten(1).amax(dim=1)

    def rows(self, rows: torch.Tensor) -> NoisyLatents:
        """The samples of these numbers."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return NoisyLatents(
            **{name: t if t is None else t[to_device(rows, t.device)] for name, t in parts.items()}
        )


class Objective(ABC):
    """Schedule and prediction type. `times` are in the objective's own unit: sigmas for flow matching, integer
    timesteps for DDPM."""

    is_flow: bool
    prediction_type: str
    """"velocity" for flow matching, "epsilon" or "v" for DDPM"""
    timestep_options: TimestepOptions

    @abstractmethod
    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, draws: StepDraws
    ) -> NoisyLatents:
        """Noise the latents [B, C, ...] to `times`, one per sample [B], per frame [B, F] or per token (see
        `expand_like`); `draws` feeds options that need more random numbers."""

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio at timesteps of any shape on the 0..1000 scale."""

    @abstractmethod
    def validation_times(self) -> list[float]:
        """The four fixed noise levels of a validation pass, in the unit of `times`."""

    weighs: bool = False
    """whether --weighting_scheme weighs the loss"""

    def loss_weight(self, sample: NoisyLatents) -> torch.Tensor | None:
        """Weight of the element-wise loss, one per time, applied before the mask; None = 1."""
        return None

    def weights_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The same at timesteps of any shape on the 0..1000 scale."""
        return torch.ones_like(timesteps)

    def whole_levels(self) -> torch.Tensor:
        """The whole timesteps in the range of the run [N], float64, the cleanest first."""
        options = self.timestep_options
        low, high = levels.timestep_range(options.min_timestep, options.max_timestep)
        first = max(low, 1) if self.is_flow else low  # at 0 a flow model has nothing to learn
        return torch.arange(first, high + self.is_flow, dtype=torch.float64)

    def notices(self) -> list[str]:
        """Lines for the log at start."""
        return []


def expand_like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """values as they broadcast over latents [B, C, ...] of any rank, or over packed ones [B, tokens, D].

    One per sample [B]; one per frame [B, F] of latents [B, C, F, h, w]; one per token [B, tokens], tokens being square
    patches of all frames, row by row as models pack them.
    """
    if values.ndim == 1:
        return values.reshape(-1, *[1] * (latents.ndim - 1))
    count = values.shape[1]
    if latents.ndim == 3 and count == latents.shape[1]:
        return values.unsqueeze(2)  # [B, tokens, 1]
    if latents.ndim == 5 and count == latents.shape[2]:
        return values[:, None, :, None, None]
    frames = latents.shape[2:-2]  # (F,), or () for pictures
    height, width = latents.shape[-2:]
    side = math.isqrt(math.prod(frames) * height * width // count) if count else 0
    if (
        latents.ndim < 4
        or not side
        or (height % side, width % side) != (0, 0)
        or math.prod(frames) * (height // side) * (width // side) != count
    ):
        raise ValueError(
            f"{count} times for each sample fit neither frames nor tokens of latents of shape {list(latents.shape)}"
        )
    patches = values.reshape(-1, 1, *frames, height // side, width // side)
    return patches.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)  # [B, 1, ..., h, w]


class FlowMatchingObjective(Objective):
    """x_t = (1 - s) x0 + s noise. Target by `target`: velocity noise - x0, reverse_velocity x0 - noise, latents x0
    (compared with `clean_estimate`).

    `timestep_options`: TimestepOptions; `noise_options`: NoiseOptions or None (only ip_noise_gamma has a meaning here);
    `weigh`: whether the loss is weighted by `--weighting_scheme`; `by_table`: at the nearest of 1000 whole timesteps.
    """

    is_flow = True
    prediction_type = "velocity"

    def __init__(
        self, timestep_options: TimestepOptions, noise_options: NoiseOptions | None = None, *,
        target: str = "velocity", weigh: bool = False, by_table: bool = False,
    ) -> None:
        if target not in FLOW_TARGETS:
            raise ValueError(f"target is '{target}'; known: {', '.join(FLOW_TARGETS)}")
        self.timestep_options = timestep_options
        self.noise_options = noise_options
        self.target = target
        self.weigh = weigh
        self.by_table = by_table

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, draws: StepDraws
    ) -> NoisyLatents:
        sigmas = to_device(times, latents.device, torch.float32)
        input_noise = with_ip_noise(noise, self.noise_options, draws)
        noisy = flow_noisy_latents(latents, input_noise, sigmas)
        target = flow_target(latents, noise, self.target)
        timesteps, known = sigmas * levels.NUM_TIMESTEPS, None
        if times.device.type == "cpu":
            known = timesteps if timesteps.device.type == "cpu" else times.float() * levels.NUM_TIMESTEPS
        return NoisyLatents(latents, noisy, noise, timesteps, sigmas, target, known)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """((1 - s) / s)^2, infinite at s = 0."""
        sigmas = timesteps.float() / levels.NUM_TIMESTEPS
        return ((1 - sigmas) / sigmas) ** 2

    def validation_times(self) -> list[float]:
        options = self.timestep_options
        steps = levels.validation_timesteps(options.min_timestep, options.max_timestep)
        return [step / levels.NUM_TIMESTEPS for step in steps]

    def loss_weight(self, sample: NoisyLatents) -> torch.Tensor | None:
        return self._weights(sample.sigmas) if self.weighs else None

    def weights_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self._weights(timesteps / levels.NUM_TIMESTEPS) if self.weighs else torch.ones_like(timesteps)

    @property
    def weighs(self) -> bool:
        return self.weigh and self.timestep_options.weighting_scheme in ("sigma_sqrt", "cosmap")

    def _weights(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at sigmas of any shape."""
        sigmas = levels.nearest_table_sigmas(sigmas * levels.NUM_TIMESTEPS) if self.by_table else sigmas
        return levels.flow_weights(self.timestep_options.weighting_scheme, sigmas)


class DdpmObjective(Objective):
    """x_t = sqrt(ac_t) x0 + sqrt(1 - ac_t) noise with the scaled-linear schedule of Stable Diffusion.

    Target: the noise (`prediction_type` epsilon) or v = sqrt(ac_t) noise - sqrt(1 - ac_t) x0. The target holds the
    noise of noise_offset and multires, not that of ip_noise_gamma. All tables belong to the schedule in use, so with
    `zero_terminal_snr` the signal-to-noise ratios are those of the rescaled one.
    """

    is_flow = False

    def __init__(
        self, timestep_options: TimestepOptions, noise_options: NoiseOptions | None = None, *,
        prediction_type: str = "epsilon", zero_terminal_snr: bool | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is '{prediction_type}'; known: {', '.join(PREDICTION_TYPES)}")
        self.timestep_options = timestep_options
        self.noise_options = noise_options
        self.prediction_type = prediction_type
        if zero_terminal_snr is None:
            zero_terminal_snr = noise_options is not None and noise_options.zero_terminal_snr
        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_cumprod = ddpm_alphas_cumprod(zero_terminal_snr)  # [1000] float64
        self._tables = self.tables_of(self.alphas_cumprod)

    @staticmethod
    def tables_of(alphas_cumprod: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is looked up at timesteps, each [1000] float32."""
        return {
            "signal": alphas_cumprod.sqrt().float(),
            "noise": (1 - alphas_cumprod).sqrt().float(),
            "snr": (alphas_cumprod / (1 - alphas_cumprod)).float(),
        }

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, draws: StepDraws
    ) -> NoisyLatents:
        noise = with_noise_offset(noise, latents, self.noise_options, draws)
        noise = with_multires_noise(noise, self.noise_options, draws)
        input_noise = with_ip_noise(noise, self.noise_options, draws)
        known = times.float() if times.device.type == "cpu" else None
        times = to_device(times, latents.device, torch.float32)
        places = times.long()
        sigmas = self._look_up("noise", places)
        signal, scale = expand_like(self._look_up("signal", places), latents), expand_like(sigmas, latents)  # [B, 1, ...]
        noisy = signal * latents + scale * input_noise
        target = signal * noise - scale * latents if self.prediction_type == "v" else noise
        return NoisyLatents(latents, noisy, noise, times, sigmas, target, known)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """ac / (1 - ac) of the schedule in use; 0 at the last step of a zero-terminal one."""
        return self._look_up("snr", timesteps)

    def _look_up(self, name: str, timesteps: torch.Tensor) -> torch.Tensor:
        """Entries of a table at timesteps of any shape; the table moves to their device once."""
        if self._tables[name].device != timesteps.device:
            self._tables[name] = self._tables[name].to(timesteps.device)
        return self._tables[name][timesteps.long()]

    def validation_times(self) -> list[float]:
        options = self.timestep_options
        return [float(step) for step in levels.validation_timesteps(options.min_timestep, options.max_timestep)]

    def notices(self) -> list[str]:
        lines = []
        if self.zero_terminal_snr:
            lines.append(
                "--zero_terminal_snr: noise, loss weights and samples all follow the rescaled schedule (known trainers "
                "weigh by the"
                " signal-to-noise ratios of the plain one)"
            )
        if self.zero_terminal_snr and self.prediction_type != "v":
            lines.append(
                "--zero_terminal_snr without --v_parameterization: nothing is learned at the last, pure-noise step"
            )
        if self.noise_options is not None and self.noise_options.multires_noise_iterations:
            lines.append(
                "--multires_noise_iterations: the noise is scaled to standard deviation 1 per sample, so that a result "
                "does"
                " not depend on the other samples of the batch (known trainers scale the whole batch)"
            )
        return lines


def flow_noisy_latents(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """(1 - s) x0 + s noise for latents [B, C, ...] and sigmas as `expand_like` takes them."""
    weights = expand_like(sigmas, latents)
    return (1 - weights) * latents + weights * noise


def flow_target(latents: torch.Tensor, noise: torch.Tensor, kind: str) -> torch.Tensor:
    """What a flow model learns: see FlowMatchingObjective."""
    if kind == "latents":
        return latents
    return noise - latents if kind == "velocity" else latents - noise


def clean_estimate(velocity: torch.Tensor, noisy_latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - s v for a predicted velocity v = noise - x0 [B, C, ...] at sigmas as `expand_like` takes them."""
    return noisy_latents - expand_like(sigmas, noisy_latents) * velocity


def ddpm_alphas_cumprod(zero_terminal_snr: bool) -> torch.Tensor:
    """Cumulative product of 1 - beta [1000] float64, betas = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2.

    With `zero_terminal_snr` its root is shifted so that the last one is 0 and stretched so that the first one stays.
    Source: arXiv 2305.08891, algorithm 1.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, levels.NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        roots = alphas_cumprod.sqrt()
        first, last = roots[0], roots[-1]
        alphas_cumprod = ((roots - last) * first / (first - last)) ** 2
    return alphas_cumprod


def with_noise_offset(
    noise: torch.Tensor, latents: torch.Tensor, options: NoiseOptions | None, draws: StepDraws
) -> torch.Tensor:
    """noise [B, C, ...] plus one normal number per sample and channel, scaled by `--noise_offset`.

    `noise_offset_random_strength` scales the offset by one uniform number of the global batch; `adaptive_noise_scale` a
    makes it max(0, offset + a * |mean of the latents|) per sample and channel.
    """
    if options is None or not options.noise_offset:
        return noise
    strength = options.noise_offset
    if options.noise_offset_random_strength:
        strength = strength * draws.batch_uniform("noise_offset_strength")
    shape = (noise.shape[1], *[1] * (noise.ndim - 2))
    offset = to_like(draws.normal("noise_offset", shape), noise)  # [B, C, 1, ...]
    if options.adaptive_noise_scale:
        mean = latents.mean(dim=tuple(range(2, latents.ndim)), keepdim=True).abs()  # [B, C, 1, ...]
        return noise + (strength + options.adaptive_noise_scale * mean).clamp(min=0) * offset
    return noise + strength * offset


def with_multires_noise(noise: torch.Tensor, options: NoiseOptions | None, draws: StepDraws) -> torch.Tensor:
    """noise [B, C, ..., H, W] plus coarser noise: level i has sides divided by r^i, r = 2..4, and the weight
    discount^i.

    Each sample is scaled to standard deviation 1 at the end.
    """
    if options is None or not options.multires_noise_iterations or noise.shape[0] == 0:
        return noise
    height, width = noise.shape[-2:]
    lead = tuple(noise.shape[1:-2])
    for i in range(options.multires_noise_iterations):
        ratio = 2 + 2 * draws.batch_uniform("multires_ratio", i)
        size = (max(1, int(height / ratio**i)), max(1, int(width / ratio**i)))
        coarse = to_like(draws.normal("multires_noise", (*lead, *size), i), noise)  # [B, C, ..., h, w]
        rows = F.interpolate(coarse.reshape(noise.shape[0], -1, *size), (height, width), mode="bilinear")
        noise = noise + rows.reshape(noise.shape) * options.multires_noise_discount**i
        if 1 in size:
            break
    return noise / expand_like(noise.flatten(1).std(dim=1), noise)


def with_ip_noise(noise: torch.Tensor, options: NoiseOptions | None, draws: StepDraws) -> torch.Tensor:
    """The noise that goes into the model's input: `noise` plus `--ip_noise_gamma` times fresh noise.

    `ip_noise_gamma_random_strength` scales gamma by one uniform number of the global batch.
    """
    if options is None or not options.ip_noise_gamma:
        return noise
    gamma = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        gamma = gamma * draws.batch_uniform("ip_noise_strength")
    return noise + gamma * to_like(draws.normal("ip_noise", noise.shape[1:]), noise)
