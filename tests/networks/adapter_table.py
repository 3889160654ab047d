"""Every kind of adapter that is tested, in one table: a new kind is one line here and is tested like all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.core.registry import import_target
from networks.kinds.network_base import AdapterModule, AdditionalNetwork, build_module, read_settings
from networks.kinds.registry import NetworkKind
from networks.kinds.selection import LayerPlan
from networks.kinds.targets import Layer, targets_of_family


@dataclass(frozen=True)
class Adapter:
    """`families`: those that have its arguments, the first of them trains it even where another of its kind comes
    first; `fixed`: tensors of its file that are not trained; `split`: rows of the parts where it trains parts; `pairs`:
    its --network_args; `rank` and `alpha` as a user would give them; `tucker`: whether it has a Tucker form; `layers`:
    the kinds of layers it is defined for; `rate`: a learning rate at which a short run learns."""

    module: str
    pairs: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 2
    alpha: float | None = 1.5
    tucker: bool = True
    layers: tuple[str, ...] = ("linear", "conv1x1", "conv3x3")
    rate: float = 5e-3
    families: tuple[str, ...] = ("sd", "sdxl", "flux", "anima", "chroma", "lumina", "hunyuan_image")
    split: tuple[int, ...] = (4, 4, 4)
    fixed: tuple[str, ...] = ()


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter("networks.lora"),
    "dora": Adapter("networks.lora", {"dora_wd": "True"}),
    "dora_input": Adapter("networks.lora", {"dora_wd": "True", "wd_on_output": "False"}),
    "rs_lora": Adapter("networks.lora", {"rs_lora": "True"}),
    "ggpo": Adapter("networks.lora", {"ggpo_sigma": "0.03", "ggpo_beta": "0.01"}),
    "split_qkv": Adapter("networks.lora", {"split_qkv": "True"}, families=("flux", "hunyuan_image")),
    "loha": Adapter("networks.loha"),
    "loha_dora": Adapter("networks.loha", {"dora_wd": "True"}),
    "loha_dora_input": Adapter("networks.loha", {"dora_wd": "True", "wd_on_output": "False"}),
    "loha_rs": Adapter("networks.loha", {"rs_lora": "True"}),
    "lokr": Adapter("networks.lokr", {"factor": "2"}, rank=1),
    "lokr_both": Adapter("networks.lokr", {"factor": "4", "decompose_both": "True"}, rank=1),
    "lokr_unbalanced": Adapter("networks.lokr", {"unbalanced_factorization": "True"}, rank=1),
    "lokr_full": Adapter("networks.lokr", {"full_matrix": "True"}, tucker=False),
    "lokr_large_rank": Adapter("networks.lokr", rank=100),
    "oft": Adapter("networks.oft", rank=4, tucker=False),
    "oft_constrained": Adapter("networks.oft", rank=4, alpha=0.01, tucker=False),
    "diag_oft": Adapter("networks.diag_oft", rank=3, alpha=0.02, tucker=False),
    "diag_oft_rescaled": Adapter("networks.diag_oft", {"rescaled": "True"}, rank=4, alpha=0.0, tucker=False),
    "boft": Adapter("networks.boft", rank=6, tucker=False),
    "boft_rescaled": Adapter("networks.boft", {"rescaled": "True"}, rank=7, alpha=0.05, tucker=False),
    "glora": Adapter("networks.glora", tucker=False),
    "lokr_dora": Adapter("networks.lokr", {"dora_wd": "True", "wd_on_output": "False"}, rank=1),
    "lokr_dora_output": Adapter("networks.lokr", {"dora_wd": "True"}, rank=1),
    "lora_fa": Adapter("networks.lora_fa", tucker=False, fixed=("lora_down",)),
    "dylora": Adapter("networks.dylora", {"unit": "2"}, rank=6, rate=1e-2, tucker=False),
    "tlora": Adapter("networks.tlora", {"tlora_min_rank": "2"}, rank=6),
    "ia3": Adapter("networks.ia3", fixed=("on_input",), rate=3e-2, rank=1, alpha=None, tucker=False),
    "full": Adapter("networks.full", rate=2e-3, rank=1, alpha=None, tucker=False),
    "norm": Adapter("networks.norm", rate=1e-2, rank=1, alpha=None, tucker=False, layers=("layer_norm", "group_norm")),
}


def kind_of_adapter(adapter: Adapter) -> NetworkKind:
    return import_target(f"{adapter.module}:KIND")


def make_adapter(adapter: Adapter, layer: Any, multiplier: float = 1.0, **more: Any) -> AdapterModule:
    """The adapter of one layer, through the settings that --network_args give."""
    kind = kind_of_adapter(adapter)
    targets = kind.targets(targets_of_family(adapter.families[0]))
    conv = {} if "conv_dim" in kind.refused else {"conv_dim": str(adapter.rank)}
    settings = read_settings(kind, targets, adapter.rank, adapter.alpha, None, {**adapter.pairs, **conv, **more})
    split = adapter.split if settings.get("split_qkv") and type(layer).__name__ == "Linear" else None
    plan = LayerPlan(Layer("lora_unet_layer", "layer", layer), adapter.rank, adapter.alpha, None, split)
    module = build_module(kind, plan, multiplier, settings)
    kind.prepare(AdditionalNetwork(targets, settings, [module], multiplier))
    return module
