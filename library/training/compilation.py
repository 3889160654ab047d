"""How modules compute: the repeated blocks of a denoiser compiled one by one (--torch_compile), activations of text
encoders computed again in the backward pass (--gradient_checkpointing)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from library.core.forward_values import checkpoint_contexts
from library.core.keyed_random import DRAWING

logger = logging.getLogger(__name__)


def backend_problems(backend: str, option: str = "dynamo_backend") -> list[str]:
    """A message when this torch has no such backend (the option lists names of many torch versions), or the system
    lacks the compiler that it needs."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        return [
            f"--{option} is {backend}, which this version of torch does not have; needed: one of {', '.join(known)}"
        ]
    lacking = _lacking_compiler() if backend == "inductor" else None
    if lacking is None:
        return []
    return [
        f"--{option} is inductor, which needs {lacking}; leave the option that compiles out, or take aot_eager, which"
        " needs no compiler and saves little time"
    ]


def _lacking_compiler() -> str | None:
    """What inductor compiles with and the system does not have: Triton for a GPU, a C++ compiler without one."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton_package

        return None if has_triton_package() else "the package triton (on Windows triton-windows)"
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        return "a C++ compiler: g++ (clang++ on macOS, cl on Windows), or the one that the variable CXX names"
    return None


LEAST_VARIANTS = 64
"""how many versions of a function are kept at least, unless the user says how many"""


def leave_draws_out() -> None:
    """Let compiled code call what draws by keys as it is."""
    for owner, name in DRAWING:
        method = getattr(owner, name)
        if not hasattr(method, "_torchdynamo_disable"):
            setattr(owner, name, torch.compiler.disable(method))


def compile_blocks(
    denoiser: torch.nn.Module, backend: str, *, mode: str | None = None, dynamic: bool | None = None,
    fullgraph: bool = False, variants: int | None = None,
) -> int:
    """Compile the repeated blocks of `denoiser` one by one, in place; returns their number.

    Blocks of a kind and size share one compiled graph, so that compiling takes seconds where the whole model takes
    minutes. Call it after adapters are attached: what they put in place of a layer's forward is compiled with the
    block. `mode`, `dynamic` and `fullgraph` are those of torch.compile; `variants`: how many sizes of a block are kept.
    """
    leave_draws_out()
    blocks = denoiser.repeated_blocks()
    for block in blocks:
        block.compile(backend=backend, mode=mode if backend == "inductor" else None, dynamic=dynamic, fullgraph=fullgraph)
    # A U-Net has blocks of one class in many sizes, a block many layers with adapters, and a set many sizes of
    # pictures; past its limit dynamo gives up in silence.
    config = torch._dynamo.config
    config.cache_size_limit = variants or max(config.cache_size_limit, LEAST_VARIANTS, 4 * len(blocks))
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, 4 * config.cache_size_limit)
    logger.info("compiled %d blocks with backend %s", len(blocks), backend)
    return len(blocks)


def checkpoint_activations(encoder: Any) -> None:
    """Gradient checkpointing of a model of transformers, which has two names for it: the old one goes with version
    6."""
    kwargs = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(encoder, "activation_checkpointing_enable"):
        encoder.activation_checkpointing_enable(kwargs)
    else:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
