"""The layers that adapters train, and their names in files of other programs."""

from __future__ import annotations

from networks.files.file_names import LayerNames
from networks.kinds.targets import NetworkTargets, TextEncoderTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights", "file_layers"]

TARGETS = NetworkTargets(
    family="pastel",
    file_state="pastel.files:own_state",
    classes=("PastelStroke",),
    text_encoders=(
        TextEncoderTargets(
            "lora_te", ("PastelReader",), comfy_name="text_encoders.pastel.transformer", paths=("reader.read",),
            file_state="pastel.files:own_state"
        ),
    ),
)


def file_layers() -> tuple[LayerNames, ...]:
    return tuple(
        LayerNames(f"strokes.{{i}}.{name}", (f"transformer_blocks.{{i}}.{name}",)) for name in ("mix", "caption", "out")
    )
