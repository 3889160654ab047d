"""Random draws as pure functions of a key.

A stream of random numbers depends on everything that was drawn before, so that worker processes, ranks, accumulation or
a resumed run change the result. Here every draw has a key (seed, purpose, global step, position in the global batch)
and nothing else, and the same key gives the same numbers anywhere. Numbers are drawn on the CPU in float32; only the
masks of dropouts, which are large and many, are drawn where they are used, and there are those of that device.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


NOISE = "noise"
"""purpose of the noise of a training step"""
EMPTY_SHA256 = hashlib.sha256()
"""copied, because for a new one OpenSSL looks for who computes it, which takes longer than the digest of a key"""


def key_seed(seed: int, purpose: str, *keys: int | str) -> int:
    """A 63-bit seed for this key. Independent keys give independent seeds (sha256 of the key's text)."""
    text = "\x1f".join([str(int(seed)), purpose, *map(str, keys)])
    sha256 = EMPTY_SHA256.copy()
    sha256.update(text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(sha256.digest()[:8], "little") >> 1


def keyed_random(seed: int, purpose: str, *keys: int | str) -> random.Random:
    """Python's generator for this key."""
    return random.Random(key_seed(seed, purpose, *keys))


class LateRandom:
    """The generator of `keyed_random`, seeded when the first number is asked for: a sample that draws nothing does not
    wait for it."""

    def __init__(self, seed: int, purpose: str, *keys: int | str) -> None:
        self._key = (seed, purpose, *keys)
        self._generator: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        if self._generator is None:
            self._generator = keyed_random(*self._key)
        return getattr(self._generator, name)


def keyed_generator(
    seed: int, purpose: str, *keys: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator for this key. Each kind of device makes numbers of its own."""
    import torch

    return torch.Generator(device).manual_seed(key_seed(seed, purpose, *keys))


DRAWING: list[tuple[type, str]] = []
"""classes and names of the methods that are marked by `drawing`"""


class drawing:
    """Marks a method that draws by a key. A compiler would make its code anew for every step, whose number is in the
    key; `library/training/compilation.py` leaves these methods out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self._function)
        DRAWING.append((owner, name))


@lru_cache(maxsize=16)
def _used_generator(device: torch.device | str, thread: int) -> torch.Generator:
    """For numbers that are drawn at once: in any state, to be seeded first, and of this thread alone."""
    import torch

    return torch.Generator(device)


@dataclass(frozen=True)
class StepDraws:
    """The draws of one micro-batch: `positions[i]` is the place of sample i in the global batch of optimizer step
    `step`.

    All results are float32 tensors whose first dimension is the sample; on the CPU unless `device` says otherwise.
    """

    seed: int
    step: int
    positions: tuple[int, ...]
    first_seed: int | None = None
    """that of the draws which these are apart from; None of draws that are not"""

    @property
    def step_seed(self) -> int:
        """For what is drawn once for a whole step, draws apart from these included."""
        return self.seed if self.first_seed is None else self.first_seed

    def generator(
        self, purpose: str, sample: int, *keys: int | str, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """The generator of sample number `sample` of this micro-batch."""
        return keyed_generator(self.seed, purpose, self.step, self.positions[sample], *keys, device=device)

    def apart(self, name: str) -> StepDraws:
        """Other draws for the same samples, independent of these: what is drawn for a purpose can be drawn once
        more."""
        return StepDraws(key_seed(self.seed, f"draws apart: {name}"), self.step, self.positions, self.step_seed)

    @drawing
    def normal(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> torch.Tensor:
        """Standard normal numbers [B, *shape]."""
        return self._filled("normal_", purpose, shape, keys)

    @drawing
    def uniform(
        self, purpose: str, shape: Sequence[int] = (), *keys: int | str, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Numbers in [0, 1) [B, *shape]."""
        return self._filled("uniform_", purpose, shape, keys, device)

    @drawing
    def batch_uniform(self, purpose: str, *keys: int | str) -> float:
        """One number in [0, 1) for the whole global batch: the same for every sample and rank."""
        return keyed_random(self.seed, purpose, self.step, *keys).random()

    @drawing
    def batch_uniforms(
        self, purpose: str, count: int, *keys: int | str, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Numbers in [0, 1) [count], float32: the same for every sample and rank."""
        import torch

        generator = keyed_generator(self.seed, purpose, self.step, *keys, device=device)
        return torch.rand(count, generator=generator, device=device)

    def _filled(
        self, fill: str, purpose: str, shape: Sequence[int], keys: Sequence[int | str],
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """[B, *shape], every row filled by this method of tensors with the generator of its sample; it is one object,
        seeded for each of them."""
        import torch

        numbers = torch.empty((len(self.positions), *shape), device=device)
        generator = _used_generator(device, threading.get_ident())
        for row, position in zip(numbers, self.positions):
            seed = key_seed(self.seed, purpose, self.step, position, *keys)
            getattr(row, fill)(generator=generator.manual_seed(seed))
        return numbers


@contextmanager
def isolated_rng(seed: int):
    """Run code that reads the global generators (samplers of other packages, say) with a given seed, then restore
    them."""
    import numpy
    import torch

    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
