"""A kind of adapter: HiRA, whose change is the weight itself times a product of two thin matrices, element by element
(Hadamard high-rank adaptation).

    --network_module hira

The change W * (B A) has a high rank though B [out, r] and A [r, in] are thin. B begins at zero, so that nothing is
changed at first. The last lines register the kind: whatever imports this module then reads its files (tools: --plugins
hira).
"""

from __future__ import annotations

import torch
from torch import nn

from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind, register_kind


class HiraModule(AdapterModule):
    """`hira_a` [r, in], `hira_b` [out, r] of one layer; inputs of a convolution are its channels times its kernel."""

    weight_keys = ("hira_a", "hira_b")
    has_alpha = False
    decomposable = False

    def build(self) -> None:
        rows, columns = self.org_module.weight.flatten(1).shape
        self.hira_a = nn.Parameter(torch.empty(self.lora_dim, columns))
        self.hira_b = nn.Parameter(torch.empty(rows, self.lora_dim))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """A normal, B zero. The generator is keyed by the run's seed and the layer, so that runs can be repeated."""
        self.hira_a.normal_(std=self.hira_a.shape[1] ** -0.5, generator=generator)
        self.hira_b.zero_()

    @staticmethod
    def weight_change(tensors, weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """multiplier * W * (B A): the one formula for training, merging and the tools."""
        product = tensors["hira_b"].float() @ tensors["hira_a"].float()  # [out, in]
        return multiplier * weight.float() * product.view(weight.shape)

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        """For --scale_weight_norms."""
        self.hira_b.mul_(ratio)


def shape_from_file(tensors, split):
    """(rank, alpha, what `build` takes) of a layer in a file."""
    return tensors["hira_a"].shape[0], None, {}


KIND = NetworkKind(
    "HiRA", HiraModule, shape_from_file,
    refused={"dropout": "there are no inner values to drop", "network_alpha": "its change has the scale of the weight"},
)  # fmt: skip
register_kind(KIND, "hira_a", "hira_b")

_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
