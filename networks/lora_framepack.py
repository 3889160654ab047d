"""FramePack: the layers that adapters train, all of them in the double and single blocks, without norms and their
modulations. Its text encoders are never trained.

The module tree is that of diffusers, and so are the names in files of other programs. Adapters of HunyuanVideo fit:
their fused layers are taken apart as diffusers does (`reads`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.lazy_names import homes, lazy_names
from networks.kinds.targets import NetworkTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights", "file_layers"]

__getattr__, __dir__ = lazy_names(__name__, homes("networks.lora", "LoRAModule"))


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs: the parts of HunyuanVideo's, one by one."""
    from networks.files.file_names import LayerNames
    from networks.files.stream_layers import stream_layers

    return tuple(LayerNames(part, (part,)) for layer in stream_layers() for part in layer.parts)


TARGETS = NetworkTargets(
    family="framepack",
    file_state="library.framepack_utils:denoiser_state",
    classes=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    attention_paths=r"(single_)?transformer_blocks\.\d+\.attn\..*",
    default_excludes=(r".*(norm).*",),
    reads=("hunyuan_video",),
    regex_on_path=True,
)
