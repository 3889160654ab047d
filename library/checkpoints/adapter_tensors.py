"""The names of tensors that tell adapter files from models: those of the project's kinds, and of kinds from outside.

Kinds from outside are told by `networks.kinds.registry.register_kind`: in modules behind --plugins, and in those that
installed packages name in the entry-point group `atelier.adapters`, which are imported when a file has no tensor of the
project's kinds.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping

from library.core.errors import ConfigError
from library.core.registry import import_outside, installed_points

logger = logging.getLogger(__name__)

GROUP = "adapters"

ADAPTER_ENDINGS = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora.down.weight",
    ".lora.up.weight",
    "_lora.down.weight",
    "_lora.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_linear_layer.up.weight",
    ".lora_A.default.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
    ".oft_blocks.0",
    ".oft_diag",
    ".dora_scale",
    ".a1.weight",
    ".diff",
    ".diff_b",
    ".w_norm",
    ".b_norm",
    ".on_input",
    "_lora1.down.weight",
    "_lora2.down.weight",
)

LAYERED_WORD = re.compile(r"IN\d\d|MID|OUT\d\d")
"""names of the vectors of a word that has its own for each layer of a U-Net"""

OUTSIDE: dict[str, str] = {}
"""name of a layer's tensor -> module of the kind from outside that has it"""


@functools.cache
def load_installed_kinds() -> None:
    """Import the network modules of installed packages, once: each registers its kind. One that cannot be imported is
    told in the log."""
    for name, module in installed_points(GROUP).items():
        try:
            import_outside(module, f"the installed network module '{name}'")
        except ConfigError as error:
            logger.warning("%s; its files are not recognised", error)


def outside_endings() -> tuple[str, ...]:
    """Endings of keys that belong to kinds from outside."""
    load_installed_kinds()
    return tuple(f".{name}" for name in OUTSIDE)


def holds_adapter(keys: Iterable[str]) -> bool:
    """Whether one of these names is a tensor of an adapter."""
    keys = list(keys)
    return any(key.endswith(ADAPTER_ENDINGS) for key in keys) or any(key.endswith(outside_endings()) for key in keys)


def no_adapter(label: str, keys: Iterable[str], metadata: Mapping[str, str] | None = None) -> str:
    """The message for a file without such names. Its metadata may name the module that made it: to import it is for the
    user to say."""
    module = (metadata or {}).get("ss_network_module", "")
    hint = (
        f"; its metadata name the network module {module}: if you trust it, add --plugins {module}"
        if _is_foreign(module)
        else ""
    )
    return f"{label} is no adapter: it holds {next(iter(keys), 'nothing')} and no lora_down, lora_A or the like{hint}"


def _is_foreign(module: str) -> bool:
    return (
        bool(module)
        and module.isascii()
        and module.replace(".", "_").isidentifier()
        and module.split(".")[0] not in ("networks", "lycoris")
    )


def holds_layered_word(names: Iterable[str]) -> bool:
    """Whether the tensors of a file are vectors of a word for each layer of a U-Net."""
    names = list(names)
    return bool(names) and all(LAYERED_WORD.fullmatch(name) for name in names)
