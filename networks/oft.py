"""OFT: the rows of a weight are rotated in blocks (arXiv 2306.07280), optionally by a limited angle (COFT).

A rotation keeps the angles between a layer's neurons. `--network_module networks.oft` cuts a layer into --network_dim
blocks and writes names with oft_unet, as sd-scripts does; networks/diag_oft.py chooses blocks as LyCORIS does.
--network_alpha is the limit of COFT and never a scale. Text encoders are not trained.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.core.errors import ConfigError
from networks.kinds.adapter_module import AdapterModule, change_of
from networks.kinds.factorization import divisors
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.rotation_blocks import block_names, limit_factor
from networks.kinds.targets import NetworkTargets

if TYPE_CHECKING:
    from networks.kinds.network_base import AdditionalNetwork

logger = logging.getLogger(__name__)

DEFAULT_CONSTRAINT = 1e-3

REFUSED: Mapping[str, str] = {
    "dropout": "it has no inner values to drop; rank_dropout (blocks that stand still) and module_dropout work",
    "conv_dim": "enable_conv=True trains convolutions with the same --network_dim",
    "conv_alpha": "enable_conv=True trains convolutions with the same --network_alpha",
    "conv_block_dims": "block_dims counts for convolutions too",
    "conv_block_alphas": "block_alphas counts for convolutions too",
}


def cayley(blocks: torch.Tensor, constraint: float = 0.0) -> torch.Tensor:
    """Rotations [..., n, n] from free matrices [..., n, n]: R = (I + Q)(I - Q)^-1 with Q = B - B^T.

    With a constraint above 0 the Frobenius norm of Q over all blocks is brought down to it where it is larger. float32.
    """
    skew = blocks.float() - blocks.float().mT
    if constraint > 0:
        skew = skew * limit_factor(skew, constraint)
    identity = torch.eye(skew.shape[-1], device=skew.device)
    # Both factors are functions of Q and commute. I - Q can always be solved: the eigenvalues of Q are imaginary.
    # Unlike `solve`, `solve_ex` does not ask the device whether it could.
    return torch.linalg.solve_ex(identity - skew, identity + skew).result


def oft_rotated(weight: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The rows of `weight` [out, ...] in blocks of n, each block multiplied by the transpose of its rotation [k, n,
    n]."""
    count, size, _ = rotations.shape
    return torch.einsum("knm,kn...->km...", rotations, weight.unflatten(0, (count, size))).flatten(0, 1)


class RotationModule(AdapterModule):
    """What OFT and BOFT share: free matrices `oft_blocks` (a list of them where a layer is rotated in parts), a factor
    per row (`rescale`) that may be trained as well, and alpha as the limit of the rotation, 0 = none."""

    weight_keys = ("oft_blocks",)
    optional_keys = ("rescale",)
    default_alpha = DEFAULT_CONSTRAINT
    decomposable = False  # a factor per row is `rescale`
    recomputes = True

    def build(
        self, *, shapes: Mapping[str, Sequence[int]] | None = None, split: Sequence[int] | None = None,
        rescaled: bool = False
    ) -> None:
        rows, *rest = self.weight_shape
        if shapes is None and split:
            shapes = {f"oft_blocks.{number}": self.block_shape(rows) for number, rows in enumerate(split)}
        elif shapes is None:
            shapes = {"oft_blocks": self.block_shape(rows)}
        blocks = [nn.Parameter(torch.zeros(tuple(shape))) for shape in shapes.values()]
        self.oft_blocks = nn.ParameterList(blocks) if "oft_blocks.0" in shapes else blocks[0]
        if rescaled:
            self.rescale = nn.Parameter(torch.ones(rows, *[1] * len(rest)))

    @classmethod
    def unknown_keys(cls, names: Iterable[str]) -> list[str]:
        known = {*block_names(names), *cls.optional_keys, "alpha", "diff_b"}
        return sorted(set(names) - known)

    @abstractmethod
    def block_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of `oft_blocks` for so many rows, from the rank; ConfigError when they cannot be cut so."""

    @property
    def neutral_alpha(self) -> float:
        return 0.0

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def blocks(self) -> list[nn.Parameter]:
        return list(self.oft_blocks) if isinstance(self.oft_blocks, nn.ParameterList) else [self.oft_blocks]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """No rotation; nothing is drawn."""
        for block in self.blocks:
            block.zero_()
        if hasattr(self, "rescale"):
            self.rescale.fill_(1.0)

    def step_weight(self, multiplier: float | None = None) -> torch.Tensor:
        """Rank dropout: some blocks stand still for a step. Nothing is scaled up, a rotation stays one."""
        multiplier = self.multiplier if multiplier is None else multiplier
        if not self.training or not self.rank_dropout:
            return self.get_weight(multiplier)
        tensors = self.tensors()
        for number, name in enumerate(block_names(tensors)):
            tensors[name] = tensors[name] * self._moving(tensors[name], number)
        return change_of(type(self), tensors, self.original_weight(), multiplier)

    def _moving(self, blocks: torch.Tensor, part: int) -> torch.Tensor:
        """1 for the blocks that move in this step and 0 for the others, [..., count, 1, 1]."""
        shape = blocks.shape[:-2]
        draws = self.step_state.draws
        if draws is None:
            uniform = torch.rand(shape)
        else:
            purpose = f"network block dropout {part}"
            uniform = draws.batch_uniforms(purpose, shape.numel(), self.lora_name, device=blocks.device).view(shape)
        return (uniform >= self.rank_dropout).to(blocks)[..., None, None]

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Norm of the free matrices, and of what the factors differ from 1 by: a rotation has no size of its own, what
        makes it large is their norm."""
        parts = [*self.blocks, *((self.rescale - 1,) if hasattr(self, "rescale") else ())]
        return torch.stack([part.float().norm() for part in parts]).norm()

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for block in self.blocks:
            block.mul_(ratio)
        if hasattr(self, "rescale"):
            self.rescale.copy_(torch.where(ratio < 1, 1 + ratio * (self.rescale - 1), self.rescale))


class OFTModule(RotationModule):
    """OFT of one layer: `oft_blocks` [k, n, n] with k * n = rows; in parts `oft_blocks.0`, `.1`, ... [k, n_i, n_i]."""

    def block_shape(self, rows: int) -> tuple[int, ...]:
        """The rank is the number of blocks."""
        if rows % self.lora_dim:
            known = ", ".join(map(str, divisors(rows)[:12]))
            raise ConfigError(
                f"{self.lora_name}: {rows} rows do not divide into {self.lora_dim} blocks; --network_dim is the number "
                "of blocks"
                f" for OFT, use a divisor of the rows ({known}{', ...' if len(divisors(rows)) > 12 else ''})"
            )
        return self.lora_dim, rows // self.lora_dim, rows // self.lora_dim

    @classmethod
    def missing_keys(cls, names: Iterable[str]) -> list[str]:
        """A layer may be rotated in parts, oft_blocks.0 and so on."""
        names = set(names)
        return [] if names.intersection(("oft_blocks", "oft_blocks.0")) else list(cls.weight_keys)

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """multiplier * (rescale * R^T W - W), rows of one part under those of another; the limit of COFT is alpha *
        rows of the part. Sources: oft_rotated, cayley."""
        alpha = float(tensors.get("alpha", 0.0))
        names = block_names(tensors)
        original, rotated, start = weight.float(), [], 0
        for blocks in (tensors[name] for name in names):
            rows = blocks.shape[0] * blocks.shape[1]
            rotated.append(oft_rotated(original[start : start + rows], cayley(blocks, alpha * rows)))
            start += rows
        changed = torch.cat(rotated)
        if "rescale" in tensors:
            changed = changed * tensors["rescale"].float().view(-1, *[1] * (changed.ndim - 1))
        return multiplier * (changed - original)


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(number of blocks, alpha, further arguments of OFTModule) of one layer's tensors in a file."""
    shapes = {name: tuple(tensors[name].shape) for name in block_names(tensors)}
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return next(iter(shapes.values()))[0], alpha, {"shapes": shapes, "rescaled": "rescale" in tensors}


def rotation_targets(targets: NetworkTargets) -> NetworkTargets:
    """The attention layers of the denoiser; `enable_all_linear` and `enable_conv` add the others."""
    added = {"enable_all_linear": targets.classes}
    if targets.conv_classes:
        added["enable_conv"] = targets.conv_classes
    return replace(
        targets,
        classes=targets.attention_classes or targets.classes,
        conv_classes=(),
        optional_classes={**targets.optional_classes, **added},
        narrowed=(targets.attention_paths, "enable_all_linear") if targets.attention_paths else None,
        choice=None,
        text_encoders=tuple(replace(encoder, classes=(), switch=None) for encoder in targets.text_encoders),
    )


def oft_targets(targets: NetworkTargets) -> NetworkTargets:
    """As rotation_targets, under the names that sd-scripts gives; fused layers are rotated part by part."""
    return replace(rotation_targets(targets), prefix="oft_unet", part_by_part=bool(targets.splits))


def tell_constraint(network: AdditionalNetwork) -> None:
    """Say what alpha means here, as it is a scale everywhere else."""
    alphas = sorted({float(module.alpha) for module in network.loras if isinstance(module, RotationModule)})
    if alphas:
        logger.info(
            "rotations: alpha is no scale; the norm of a layer's rotation is limited to alpha * rows, with alpha %s (0 "
            "= no limit;"
            " values above 0.01 hardly limit anything)",
            ", ".join(f"{alpha:g}" for alpha in alphas),
        )


KIND = NetworkKind(
    "OFT", OFTModule, shape_from_file, refused=REFUSED, targets=oft_targets, prepare=tell_constraint
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
