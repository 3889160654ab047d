"""Samples of one bucket -> a Batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from library.dataset.batch import CONDITIONING_IMAGES, Batch
from library.dataset.items import SampleFacts
from library.dataset.plan import BatchRequest

if TYPE_CHECKING:
    from library.strategy_base import TokenizeStrategy


@dataclass
class Sample:
    """One sample, not batched. Exactly one of `image` and `latents` is set."""

    image_key: str
    caption: str
    text_outputs: dict[str, torch.Tensor] | None
    loss_weight: float
    original_size_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size_hw: tuple[int, int]
    flipped: bool
    is_reg: bool = False
    custom_attributes: dict[str, object] = field(default_factory=dict)
    image: torch.Tensor | None = None  # [3, H, W] or [3, F, H, W]
    latents: torch.Tensor | None = None  # [C, h, w] or [C, F, h, w]
    latent_seed: int | None = None
    facts: SampleFacts = SampleFacts()
    alpha_mask: torch.Tensor | None = None  # [H, W] or [F, H, W]
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)
    """what a sample has beside its latents and caption, by name; `Batch.conditions`"""

    @property
    def conditioning(self) -> torch.Tensor | None:
        """The mask or control picture among the conditions, [3, H, W] or [3, F, H, W]."""
        return self.conditions.get(CONDITIONING_IMAGES)

    @conditioning.setter
    def conditioning(self, picture: torch.Tensor) -> None:
        self.conditions[CONDITIONING_IMAGES] = picture


def collate(
    request: BatchRequest, samples: Sequence[Sample], tokenize: TokenizeStrategy | None,
    network_multiplier: float = 1.0,
    conditioning_keys: tuple[str, ...] = (),
    lists: Collection[str] = (),
) -> Batch:
    """The batch of these samples; with `tokenize` (a TokenizeStrategy) it has the tokens of the captions. No samples
    give a batch of length 0 whose tensors have no rows. `conditioning_keys`: see Batch; `lists`: those of them that
    are not stacked."""
    captions = [sample.caption for sample in samples]
    numbers = torch.tensor(  # one tensor for what is short: making each takes longer than filling it
        [[sample.loss_weight for sample in samples], [network_multiplier] * len(samples)], dtype=torch.float32
    )  # [2, B]
    sizes = torch.tensor(
        [
            [sample.original_size_hw for sample in samples], [sample.crop_top_left for sample in samples],
            [sample.target_size_hw for sample in samples],
        ],
        dtype=torch.int64,
    ).reshape(3, len(samples), 2)  # fmt: skip
    loss_weights, multipliers = numbers.unbind()
    original_sizes, crops, target_sizes = sizes.unbind()
    tokens, weights = tokenize.tokens_of(captions) if tokenize is not None and captions else (None, None)
    return Batch(
        request=request,
        image_keys=[sample.image_key for sample in samples],
        captions=captions,
        loss_weights=loss_weights,
        original_sizes_hw=original_sizes,
        crop_top_lefts=crops,
        target_sizes_hw=target_sizes,
        flippeds=[sample.flipped for sample in samples],
        network_multipliers=multipliers,
        custom_attributes=[sample.custom_attributes for sample in samples],
        are_reg=[sample.is_reg for sample in samples],
        images=_stack([sample.image for sample in samples]),
        latents=_stack([sample.latents for sample in samples]),
        latent_seeds=[sample.latent_seed for sample in samples if sample.latent_seed is not None],
        facts=[sample.facts for sample in samples],
        alpha_masks=_masks(samples),
        conditions={
            name: _stack([sample.conditions.get(name) for sample in samples])
            for name in dict.fromkeys(name for sample in samples for name in sample.conditions)
        },
        conditioning=_text_outputs([sample.text_outputs for sample in samples], lists),
        conditioning_keys=conditioning_keys,
        input_ids_list=tokens,
        token_weights_list=weights,
    )


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[B, ...], or None when no sample has it. A batch where some have it and some not cannot be made."""
    if all(tensor is None for tensor in tensors):
        return None
    if any(tensor is None for tensor in tensors):
        raise ValueError(
            "a batch mixes samples with and without cached latents or a condition (a conditioning image, say)"
        )
    return torch.stack(tensors)


def _masks(samples: Sequence[Sample]) -> torch.Tensor | None:
    """[B, H, W] or [B, F, H, W]; samples without a mask count as all ones when another has one."""
    given = [sample.alpha_mask for sample in samples if sample.alpha_mask is not None]
    if not given:
        return None
    return torch.stack(
        [torch.ones(given[0].shape) if sample.alpha_mask is None else sample.alpha_mask for sample in samples]
    )


def _text_outputs(
    outputs: Sequence[dict[str, torch.Tensor] | None], lists: Collection[str]
) -> dict[str, torch.Tensor | list[torch.Tensor]] | None:
    """One [B, ...] tensor, or a list of B, per key that all samples have, dtypes kept. None when a sample has no
    cache."""
    if not outputs or any(entry is None for entry in outputs):
        return None
    shared = [name for name in outputs[0] if all(name in entry for entry in outputs)]
    found = {name: [entry[name] for entry in outputs] for name in shared}
    return {name: tensors if name in lists else stack_padded(tensors) for name, tensors in found.items()}


def stack_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors whose first dimension may differ (token counts): shorter ones get zeros at its end."""
    if tensors[0].dim() == 0 or len({tensor.shape[0] for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    longest = max(tensor.shape[0] for tensor in tensors)
    return torch.stack([F.pad(t, (0, 0) * (t.dim() - 1) + (0, longest - t.shape[0])) for t in tensors])
