"""Low-rank factors of changes: the best ones by singular values, of whole matrices and of products of thin ones."""

from __future__ import annotations

import torch

from library.core.keyed_random import keyed_generator
from networks.operations.rank_rules import RankRule


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """[out, in * kh * kw]."""
    return weight.flatten(1)


def factors_of(change: torch.Tensor, rule: RankRule) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [rank, in, kh, kw], up [out, rank, 1, 1]) of the best approximation of a change; 2-D for a linear layer.

    up = U * S, down = Vh of the singular value decomposition in float32; `rule` chooses the rank by the singular
    values.
    """
    matrix = as_matrix(change.float())
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rule.choose(s, (matrix.shape[0], matrix.shape[1]))
    return shaped_factors(u[:, :rank] * s[:rank], vh[:rank], change.shape)


def shaped_factors(up: torch.Tensor, down: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of matrices [out, rank] and [rank, in * kh * kw] in the shapes of a layer's adapter."""
    if len(shape) == 2:
        return down.contiguous(), up.contiguous()
    ones = [1] * (len(shape) - 2)
    return down.reshape(-1, *shape[1:]).contiguous(), up.reshape(up.shape[0], -1, *ones).contiguous()


def svd_of_product(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition (U [out, r], S [r], Vh [r, in]) of up [out, r] @ down [r, in] without forming the
    product.

    QR of both factors, then the decomposition of the small core; float32.
    """
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().t())
    u, s, vh = torch.linalg.svd(r_up @ r_down.t(), full_matrices=False)
    return q_up @ u, s, vh @ q_down.t()


def widened(up: torch.Tensor, down: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same change, up [out, r] @ down [r, in] with orthonormal rows, at a higher rank: further columns of up are
    zero, further rows of down orthonormal to the others, so that they can be trained on. rank is at most the number of
    inputs."""
    have, size = down.shape
    if rank <= have:
        return up[:, :rank], down[:rank]
    drawn = torch.randn(rank - have, size, generator=keyed_generator(0, "further ranks")).to(down)
    for _ in range(2):  # once more, against rounding
        drawn = drawn - drawn @ down.t() @ down
        drawn = torch.linalg.qr(drawn.t())[0].t()
    return torch.cat([up, up.new_zeros(len(up), rank - have)], dim=1), torch.cat([down, drawn])
