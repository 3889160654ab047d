"""Models and steps without values: the real modules on the meta device, and the bytes of what they make.

Loaders, adapter, forward, backward pass and optimizer are called as in a run; every storage that an operation makes is
counted from its making to its end. What the meta device does not do by itself is done here as the device of the run
does it: mixed precision, attention that keeps no matrix of scores, and the few numbers that models read off tensors.
What kernels take inside of themselves (workspaces, packed copies of weights) and what allocators keep is not seen, but
for what convolutions copy on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from library.components import activation_offload
from library.components.attention_backends import KERNELS, torch_attention
from library.components.deferred_compiler import compiler_deferred
from library.safetensors_utils import without_values

META = torch.device("meta")
ROUNDED_TO = 512
"""bytes: what torch's allocators on devices hand out, at least"""
MOST_KNOWN = 2**16
"""elements of a tensor of whole numbers whose values are followed"""


class MemoryTracker(TorchDispatchMode):
    """Bytes of the storages on the meta device that are alive, and the most at one time since `reset`.

    Tensors of whole numbers (token ids, masks, lengths) keep their values as long as they are made of such, so that a
    model that cuts its captions cuts them here too. Any other number that is read off a tensor is 1.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._is_cpu = kind == "cpu"
        self.live = 0
        self.peak = 0
        self.away = _LeavingStore()
        self._seen: dict[int, weakref.ref] = {}
        self._known = WeakIdKeyDictionary()
        self._forms: dict[tuple, tuple | None] = {}
        self._counts: dict[Callable[..., Any], bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here; to be skipped would import the compiler."""
        return False

    def reset(self) -> int:
        """Measure the peak from here; the bytes that are alive."""
        self.peak = self.live
        return self.live

    @contextmanager
    def measured(self) -> Iterator[Measured]:
        """Around a part of a run: what it takes beyond what is alive before."""
        found, before = Measured(), self.reset()
        yield found
        found.peak, found.kept = self.peak - before, self.live - before

    def know(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of whole numbers on the meta device whose values are followed."""
        empty = values.to(META)
        self._known[empty] = values
        return empty

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return self._value_of(args[0]).item()
        if func is torch.ops.aten._to_copy.default and args[0].device == META and "device" in kwargs:
            if torch.device(kwargs["device"]).type == "cpu":
                if args[0].numel() <= MOST_KNOWN:
                    return self._value_of(args[0]).to(kwargs.get("dtype") or args[0].dtype)
                kwargs = {**kwargs, "device": META}  # weights that wait in main memory
        result = self._computed(func, args, kwargs)
        if func is torch.ops.aten._safe_softmax.default and args[0].device == META:
            self._count(result)
            self.peak = max(self.peak, self.live + args[0].numel())  # its mask of rows without a key, one byte each
        if self._is_cpu and func in _CONVOLUTIONS and args[0].device == META:
            self._count_copies(func, args, result)
        if isinstance(result, torch.Tensor):
            self._note(result, func, args, kwargs)
        elif isinstance(result, (tuple, list)):
            for value in result:
                if isinstance(value, torch.Tensor):
                    self._count(value)
        return result

    def _computed(self, func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The result of an operation. Those of repeated blocks are alike: what gave a new tensor once gives one of the
        same form to inputs of the same forms."""
        if func in _IN_PLACE and args[0].device == META:
            return args[0]
        if func in _DRAWS and isinstance(args[0], torch.nn.Parameter):
            return args[0]  # made on the CPU by an adapter: its first values mean nothing here
        if func in _POINTWISE and _is_like(args):
            return torch.empty_like(args[0])
        key = _form_of((func, args, tuple(kwargs.items())))
        if key is None:
            return func(*args, **kwargs)
        if key not in self._forms:
            result = func(*args, **kwargs)
            self._forms[key] = _forms_of(result, args)
            return result
        made = self._forms[key]
        if made is None:
            return func(*args, **kwargs)
        found = tuple(form and torch.empty_strided(*form[:2], dtype=form[2], device=META) for form in made)
        return found if self._several(func) else found[0]

    def _count_copies(self, func: Callable[..., Any], args: tuple, result: Any) -> None:
        """What oneDNN copies for a convolution, into blocks of channels: gradients of weights need both sides, all else
        the larger one at a time. Measured with torch 2.13 on 16 pictures, 1x1 and 3x3 kernels."""
        is_backward = func is not torch.ops.aten.convolution.default
        sides = [bytes_of([side]) for side in ((args[0], args[1]) if is_backward else (args[0], result))]
        made = bytes_of(one for one in (result if is_backward else (result,)) if one is not None)
        copied = sum(sides) if is_backward and args[-1][1] else max(sides)
        self.peak = max(self.peak, self.live + made + copied)

    def _several(self, func: Callable[..., Any]) -> bool:
        if func not in self._counts:
            self._counts[func] = len(func._schema.returns) > 1
        return self._counts[func]

    def _value_of(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor in self._known:
            return self._known[tensor]
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def _note(self, result: torch.Tensor, func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._count(result)
        if self._known and result.device == META and not result.is_floating_point() and result.numel() <= MOST_KNOWN:
            self._follow(result, func, args, kwargs)

    def _follow(self, result: torch.Tensor, func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The values of `result`, where those of all that it is made of are known."""
        given = [value for value in args if isinstance(value, torch.Tensor)]
        lists = [value for value in args if isinstance(value, (list, tuple))]
        given_too = [v for value in lists for v in value if isinstance(v, torch.Tensor)]
        if any(value.device == META and value not in self._known for value in (*given, *given_too)) or not given:
            self._known.pop(result, None)  # changed in place
            return
        plain = [self._known.get(value, value) if isinstance(value, torch.Tensor) else value for value in args]
        plain = [
            [self._known.get(v, v) if isinstance(v, torch.Tensor) else v for v in value]
            if isinstance(value, (list, tuple)) else value
            for value in plain
        ]  # fmt: skip
        named = {name: "cpu" if name == "device" and value is not None else value for name, value in kwargs.items()}
        if any(isinstance(value, torch.Tensor) for value in named.values()):
            return
        try:
            self._known[result] = func(*plain, **named)
        except (RuntimeError, NotImplementedError):
            self._known.pop(result, None)

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device != META:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        self.live += size
        self.peak = max(self.peak, self.live)

        def end(_: weakref.ref) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, end)


def _form_of(value: Any) -> Any:
    """What the form of a result hangs on, to be compared; None when that cannot be told."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device) if type(value) in _PLAIN else None
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_form_of, value))
        return None if None in parts else parts
    if value is None:
        return ""
    return (type(value), value) if isinstance(value, (int, float, bool, str, *_NAMED)) or callable(value) else None


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _forms_of(result: Any, args: tuple) -> tuple | None:
    """(shape, stride, dtype) of each tensor of a result, None for one that was not asked for; None unless all of them
    are new and on the meta device."""
    several = result if isinstance(result, tuple) else (result,)
    if not all(one is None or (isinstance(one, torch.Tensor) and one.device == META) for one in several):
        return None
    if any(one is not None and _shares_memory(one, args) for one in several):
        return None
    return tuple(one if one is None else (one.shape, one.stride(), one.dtype) for one in several)


def _shares_memory(result: torch.Tensor, args: tuple) -> bool:
    """Whether an operation gave a view of one of its inputs, or that input itself."""
    own = result.untyped_storage()._cdata
    flat = [v for value in args for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return any(isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == own for value in flat)


def _overloads(*names: str) -> frozenset[Callable[..., Any]]:
    packets = [packet for name in names if (packet := getattr(torch.ops.aten, name, None)) is not None]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


_POINTWISE = _overloads(
    "add", "sub", "mul", "div", "neg", "silu", "gelu", "sigmoid", "exp", "sqrt", "rsqrt", "tanh", "silu_backward",
    "gelu_backward", "clone",
)  # fmt: skip
"""give a tensor like their first input, where the others are like it too"""
_IN_PLACE = _overloads(
    "add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_", "copy_", "fill_", "zero_", "clamp_", "sqrt_",
    "neg_", "masked_fill_", "clamp_min_", "clamp_max_", "silu_", "sigmoid_", "uniform_", "normal_", "sign_", "abs_",
    "pow_", "rsqrt_", "reciprocal_", "exp_", "addmm_", "baddbmm_",
)  # fmt: skip
"""change values alone"""

_CONVOLUTIONS = _overloads("convolution", "convolution_backward")
_DRAWS = _overloads("uniform_", "normal_")


def _is_like(args: tuple) -> bool:
    """Whether all tensors have the shape and the floating-point type of the first, dense, or are single numbers of
    it."""
    first = args[0]
    if not isinstance(first, torch.Tensor) or first.device != META or not first.is_floating_point():
        return False
    return first.is_contiguous() and all(
        other.dtype == first.dtype and (other.shape == first.shape or other.ndim == 0) and other.is_contiguous()
        for other in args[1:]
        if isinstance(other, torch.Tensor)
    ) and type(first) in _PLAIN


class Measured:
    """Bytes of a part of a run: the most at one time, and what is left of it afterwards."""

    peak: int = 0
    kept: int = 0


_NARROW = frozenset({
    F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.mm,
    torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.addmm, torch.baddbmm, torch.addbmm, torch.einsum, F.conv1d,
    F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.scaled_dot_product_attention,
    torch.chain_matmul, torch.linalg.multi_dot, F.bilinear,
})  # fmt: skip
"""computed in the narrow type of mixed precision, whatever they are given"""
_WIDE_ON_GPU = frozenset({
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log,
    torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.cumsum,
    torch.Tensor.cumsum, torch.cumprod, torch.prod, torch.sum, torch.Tensor.sum, torch.norm, torch.Tensor.norm,
    F.softplus, F.cosine_similarity, torch.reciprocal, F.normalize,
})  # fmt: skip
"""computed in float32 on a GPU"""
_RANDOM = frozenset({torch.rand, torch.randn, torch.randint, torch.normal})
_WIDE_ON_CPU = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, torch.prod})


class _AsOnTheDevice(TorchFunctionMode):
    """What the meta device lacks: mixed precision, and attention that keeps no matrix of scores.

    Within `torch.autocast` weights that learn are narrowed once and kept, as autocast keeps them, until it ends.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._wide = _WIDE_ON_CPU if kind == "cpu" else _WIDE_ON_GPU
        self.narrowed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _AUTOCAST_IS_ON("cpu") and (func in _NARROW or func in self._wide):
            dtype = _AUTOCAST_DTYPE("cpu") if func in _NARROW else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func in _RANDOM and "generator" in kwargs and torch.device(kwargs.get("device") or "cpu") == META:
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}  # meta devices have none
        if func is F.scaled_dot_product_attention and args and args[0].device == META and _is_dense(args[:3]):
            return attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(v, dtype) for v in value)
        is_cast = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device == META
        if not is_cast or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self.narrowed:
            self.narrowed[id(value)] = (value, value.to(dtype))
        return self.narrowed[id(value)][1]


def _is_dense(states: tuple[torch.Tensor, ...]) -> bool:
    """Whether torch's kernels take them: others are multiplied out, with the whole matrix of scores."""
    return all(state.stride(-1) == 1 for state in states)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by a kernel that keeps its inputs, its output and one number per query."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    flat = [part.reshape(-1, *part.shape[-3:]) if part.ndim != 4 else part for part in (query, key, value)]
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *flat, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output.reshape(query.shape[:-1] + value.shape[-1:])


_AUTOCAST, _AUTOCAST_IS_ON, _AUTOCAST_DTYPE = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype


def _known_kind(kind: str | None) -> str:
    """The meta device has no mixed precision of its own: its switch is that of the CPU, where nothing computes here."""
    return "cpu" if kind in (None, "meta") else kind


def _autocast_class(mode: _AsOnTheDevice) -> type[torch.autocast]:
    class Autocast(_AUTOCAST):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_known_kind(device_type), *args, **kwargs)

        def __enter__(self) -> Any:
            # torch takes modes away in the backward pass, where checkpointed blocks run again within this context
            self._is_lacking = mode not in _get_current_function_mode_stack()
            if self._is_lacking:
                mode.__enter__()
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            ended = super().__exit__(*error)
            if self._is_lacking:
                mode.__exit__(*error)
            if not _AUTOCAST_IS_ON("cpu"):
                mode.narrowed.clear()
            return ended

    return Autocast


_GENERATOR = torch.Generator


class _Generator(_GENERATOR):
    """One for the meta device is one of the CPU that nobody asks."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return _GENERATOR("cpu" if torch.device(device) == META else device)


class _LeavingStore:
    """In the place of the store of activations that wait in main memory: they leave the device and come back as new
    tensors. `waiting`: bytes that are away, `most` of them at one time."""

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0

    def keeping(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._send, lambda form: torch.empty_strided(**form.how))

    def _send(self, tensor: torch.Tensor) -> _Form:
        size = tensor.numel() * tensor.element_size()
        self.waiting += size
        self.most = max(self.most, self.waiting)
        form = _Form(dict(size=tensor.shape, stride=tensor.stride(), dtype=tensor.dtype, device=META))
        weakref.finalize(form, self._end, size)
        return form

    def _end(self, size: int) -> None:
        self.waiting -= size


class _Form:
    """What a tensor that is away comes back as."""

    def __init__(self, how: dict[str, Any]) -> None:
        self.how = how


@contextmanager
def _torch_as_it_is() -> Iterator[None]:
    """Inside, torch has its own functions: the compiler, where something imports it, keeps them for good."""
    own = dict(
        autocast=_AUTOCAST, Generator=_GENERATOR, is_autocast_enabled=_AUTOCAST_IS_ON, get_autocast_dtype=_AUTOCAST_DTYPE
    )
    with patch.object(torch.amp, "autocast", _AUTOCAST), patch.multiple(torch, **own):
        yield


@contextmanager
def tracing(kind: str) -> Iterator[MemoryTracker]:
    """Inside, models that are loaded for the meta device have no values, and what is computed with them is counted as a
    device of this kind ("cpu", "cuda") would hold it. Whatever is made here is of no use outside."""
    mode = _AsOnTheDevice(kind)
    autocast = _autocast_class(mode)
    with ExitStack() as stack:
        stack.enter_context(compiler_deferred(importing=_torch_as_it_is))
        stack.enter_context(patch.object(torch.amp, "autocast", autocast))
        stack.enter_context(patch.multiple(
            torch, autocast=autocast, Generator=_Generator,
            is_autocast_enabled=lambda kind=None: _AUTOCAST_IS_ON(_known_kind(kind)),
            get_autocast_dtype=lambda kind: _AUTOCAST_DTYPE(_known_kind(kind)),
        ))  # fmt: skip
        tracker = MemoryTracker(kind)
        if kind != "cpu":  # on which nothing leaves
            stack.enter_context(patch.object(activation_offload, "_STORE", tracker.away))
        stack.enter_context(patch.dict(KERNELS, {name: torch_attention for name in KERNELS if name != "torch_math"}))
        stack.enter_context(without_values())
        stack.enter_context(mode)
        yield stack.enter_context(tracker)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = {id(storage := tensor.untyped_storage()): storage for tensor in tensors}
    return sum(-(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO for storage in storages.values())
