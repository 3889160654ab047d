"""Captions of a batch without the padding that no denoiser reads. Without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.dataset.strategies import Conditioning


@dataclass(frozen=True)
class PaddedText:
    """Tokens of captions whose padding the denoiser does not attend to. `mask`: the key of what marks tokens, [B, T]
    with 1 = token; `tensors`: the keys [B, T, ...] that are as long; `attended`: places behind the last token that are
    attended to all the same."""

    mask: str
    tensors: tuple[str, ...]
    attended: int = 0

    def is_in(self, conditioning: Conditioning) -> bool:
        """Whether a conditioning has all of it: caches leave out what is encoded in the step."""
        return all(name in conditioning for name in (self.mask, *self.tensors))


def without_padding(conditioning: Conditioning, texts: Iterable[PaddedText]) -> Conditioning:
    """The conditioning with these texts as long as the longest caption, and one place at least; those that are not in
    it are left to others. Masks on a device are waited for."""
    cut = dict(conditioning)
    for text in texts:
        if not text.is_in(conditioning):
            continue
        places = conditioning[text.mask].any(dim=0).nonzero()  # [n, 1], rising
        length = (int(places[-1]) + 1 if len(places) else 0) + text.attended
        cut |= {name: conditioning[name][:, : max(length, 1)] for name in (text.mask, *text.tensors)}
    return cut
