"""How many singular values of a change a LoRA keeps: a number, or as many as a rule asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.core.errors import ConfigError

NOTHING = 1e-6
"""a change whose largest singular value is not above this is nothing, and gets rank 1"""
METHODS = ("sv_ratio", "sv_fro", "sv_cumulative", "sv_quantile", "sv_threshold")
"""names of the rules, as --dynamic_method takes them; sv_quantile is another word for sv_cumulative"""
_RANGES = {
    "sv_ratio": ("1 or more", lambda p: p >= 1),
    "sv_fro": ("a number above 0, up to 1", lambda p: 0 < p <= 1),
    "sv_cumulative": ("a number above 0, up to 1", lambda p: 0 < p <= 1),
    "sv_quantile": ("a number above 0, up to 1", lambda p: 0 < p <= 1),
    "sv_threshold": ("0 or more", lambda p: p >= 0),
}


@dataclass(frozen=True)
class RankRule:
    """`method` None keeps `rank` values. With a method, `parameter` p says how many, and `rank` is the most.

    | method | number of values kept of S, in falling order |
    |---|---|
    | sv_ratio | those above S[0] / p |
    | sv_cumulative, sv_quantile | the fewest whose sum is at least p of the sum of all |
    | sv_fro | the fewest whose root of the sum of squares (Frobenius norm) is at least p of that of all |
    | sv_threshold | those above p |

    At least one is kept, and never more than there are.
    """

    rank: int
    method: str | None = None
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank is {self.rank}; needed: 1 or more")
        if self.method is None:
            if self.parameter is not None:
                raise ConfigError(
                    f"--dynamic_param is {self.parameter:g} without --dynamic_method; name one of "
                    f"{', '.join(METHODS)}, or leave it out"
                )
            return
        if self.method not in METHODS:
            raise ConfigError(f"--dynamic_method is {self.method}; known: {', '.join(METHODS)}")
        if self.parameter is None:
            raise ConfigError(f"--dynamic_method {self.method} needs --dynamic_param: {_RANGES[self.method][0]}")
        if not _RANGES[self.method][1](self.parameter):
            raise ConfigError(
                f"--dynamic_param is {self.parameter:g}; needed for {self.method}: {_RANGES[self.method][0]}"
            )

    def choose(self, values: torch.Tensor, sides: tuple[int, int]) -> int:
        """The rank for singular values (falling) of a matrix with these sides. `values` may lack those that are
        zero."""
        most = min(self.rank, *sides)
        if float(values[0]) <= NOTHING:
            return 1
        return most if self.method is None else min(max(self._asked(values.cpu().double()), 1), len(values), most)

    def _asked(self, values: torch.Tensor) -> int:
        parameter = float(self.parameter or 0.0)
        if self.method == "sv_ratio":
            return int((values > values[0] / parameter).sum())
        if self.method == "sv_threshold":
            return int((values > parameter).sum())
        sizes, share = (values**2, parameter**2) if self.method == "sv_fro" else (values, parameter)
        sums = torch.cumsum(sizes, 0)
        return int(torch.searchsorted(sums / sums[-1], share)) + 1


def quantile_of_size(tensors: list[torch.Tensor], quantile: float) -> float:
    """The value below which this share of all |numbers| of the tensors lies, with linear interpolation between
    neighbours.

    By selection, in any number of values: torch.quantile refuses more than 16 million.
    """
    sizes = torch.cat([tensor.detach().float().abs().flatten() for tensor in tensors])
    place = quantile * (sizes.numel() - 1)
    low = int(place)
    first = float(sizes.kthvalue(low + 1).values)
    if low + 1 >= sizes.numel() or place == low:
        return first
    return first + (place - low) * (float(sizes.kthvalue(low + 2).values) - first)
