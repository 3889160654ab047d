"""What makes the host wait for a device, counted without one: "meta" stands for it.

Reading a number of a device, copying from it, and copying to it without `non_blocking` wait for all work that was
queued before. Operations of torch are watched as they are called. Values of the device are made up: ones.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from library.components.device_transfers import Event, Pairs, Transfers
from library.core import keyed_random
from library.device_utils import to_device
from library.training import host_copies
from networks.kinds import ggpo

if TYPE_CHECKING:
    import pytest

    from library.training.run import Run

DEVICE = torch.device("meta")
ROOT = str(Path(__file__).parents[1])
aten = torch.ops.aten
OF_VALUES = {aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.is_nonzero.default}
"""results whose shape or kind hangs on values of the device"""


class HostWaits(TorchDispatchMode):
    """Inside, `places` counts by "what at file:line" what waits, and `queued` copies to the device that nothing waits
    for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.queued: Counter[str] = Counter()
        self._lists = _ListsToDevice(self)

    def __enter__(self) -> HostWaits:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def note(self, what: str, is_queued: bool = False) -> None:
        passed = (__file__, to_device.__code__.co_filename)
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename not in passed]
        own = [f for f in frames if "site-packages" not in f.filename]  # `make` puts an environment below the project
        place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "torch"
        (self.queued if is_queued else self.places)[f"{what} at {place}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        on_device = [tensor for tensor in given if tensor.device == DEVICE]
        if func is aten._local_scalar_dense.default and on_device:
            self.note("item")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten._to_copy.default:
            return self._copied(args[0], kwargs)
        if func is aten.copy_.default and args[0].device != args[1].device:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            to_host = args[0].device != DEVICE
            self.note(f"copy to the {'host' if to_host else 'device'}") if waits else None
            if to_host:
                return args[0].fill_(1)
        if on_device and func in OF_VALUES:
            self.note(func.name())
            return torch.ones_like(args[0]).nonzero() if func is aten.nonzero.default else func(*args, **kwargs)
        if func.name().startswith(("aten::index.", "aten::index_put")) and on_device:
            self._check_indices([index for index in args[1] if index is not None])
        return func(*args, **kwargs)

    def _copied(self, tensor: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        target = torch.device(kwargs.get("device") or tensor.device)
        if target == tensor.device:
            return aten._to_copy.default(tensor, **kwargs)
        if target == DEVICE:
            self.note("copy to the device", is_queued=bool(kwargs.get("non_blocking")))
            return aten._to_copy.default(tensor, **kwargs)
        self.note("copy to the host")
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)

    def _check_indices(self, indices: Sequence[torch.Tensor]) -> None:
        if any(index.dtype == torch.bool for index in indices):
            self.note("index by a mask")
        if any(index.device != DEVICE for index in indices):
            self.note("copy of indices to the device")


class _ListsToDevice(TorchFunctionMode):
    """torch.tensor and its like, whose copy to the device torch makes unseen."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            if torch.device(kwargs.get("device") or "cpu") == DEVICE:
                self._waits.note("list to the device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == DEVICE:
            if any(isinstance(index, list) for index in (args[1] if isinstance(args[1], tuple) else [args[1]])):
                self._waits.note("list as an index to the device")
        if func is torch.Tensor.new_tensor and args[0].device == DEVICE and "device" not in kwargs:
            self._waits.note("list to the device")
        return func(*args, **kwargs)


class QueuedTransfers(Transfers):
    """Copies beside the computation, as of a device with streams."""

    def copy(self, pairs: Pairs, after: Event) -> Event:
        for target, _ in pairs:
            target.zero_()


def imitate(patch: pytest.MonkeyPatch) -> None:
    """What "meta" lacks of a device: number formats of autocast, and generators."""
    enabled, autocast, generator = torch.is_autocast_enabled, torch.autocast, keyed_random.keyed_generator

    def keyed_generator(*key: Any, device: torch.device | str = "cpu") -> torch.Generator | None:
        return None if torch.device(device) == DEVICE else generator(*key, device=device)

    def in_precision(kind: str, *settings: Any, **more: Any) -> AbstractContextManager[Any]:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *settings, **more)

    patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != DEVICE.type and enabled(kind))
    patch.setattr(torch, "autocast", in_precision)
    for module in (keyed_random, ggpo):
        patch.setattr(module, "keyed_generator", keyed_generator)
    patch.setattr(host_copies, "transfers_to", QueuedTransfers)
    patch.setattr(torch, DEVICE.type, SimpleNamespace(manual_seed=lambda seed: None), raising=False)


def move_run(run: Run) -> None:
    """A run that has not begun goes to the device with all that it has; a module that goes to "meta" gets other
    parameters."""
    parts = [run.models.vae, *run.models.text_encoders, *run.models.of_step, *run.trainable.modules().values()]
    modules = [part for part in (*parts, *run.hooks.all_modules().values()) if part is not None]
    named = [(module, dict(module.named_parameters(remove_duplicate=False))) for module in modules]
    for module in modules:
        module.to(DEVICE)
    moved = {old[name]: p for module, old in named for name, p in module.named_parameters(remove_duplicate=False)}
    for group in run.optimizer.param_groups:
        group["params"] = [moved.get(parameter, parameter) for parameter in group["params"]]
        group.update({"fused": False} if group.get("fused") else {})  # there is no such kernel for "meta"
    object.__setattr__(run.runtime, "device", DEVICE)
