"""What a training step receives: the tensors of one micro-batch and the keys of its random draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.dataset.items import SampleFacts
from library.dataset.plan import BatchRequest
from library.device_utils import to_device

CONDITIONING_IMAGES = "conditioning_images"
"""the condition that masks and control pictures are, and the key under which plug-ins know them; further control
pictures of a sample are conditioning_images_1 and so on"""
CONDITIONING_ALPHA = "conditioning_alpha"
"""their alpha channels, for encoders that read them: conditioning_alpha, conditioning_alpha_1 and so on"""


def numbered(name: str, number: int) -> str:
    """The condition that the control picture of this number is, counted from 0."""
    return name if number == 0 else f"{name}_{number}"


PRESERVED = "diff_output_preservation"
"""attribute of subsets whose samples learn to keep what the untouched model predicts"""


@dataclass
class Batch:
    """One micro-batch of one rank, B samples of one bucket. B may be 0 (see BatchRequest).

    Field names are the batch keys that plug-ins know; `batch["latents"]` reads a field too. Pictures have no axis of
    frames, clips have it before the height.
    """

    request: BatchRequest
    image_keys: list[str]
    """files, for messages"""
    captions: list[str]
    loss_weights: torch.Tensor  # [B] float32
    original_sizes_hw: torch.Tensor  # [B, 2] int64
    crop_top_lefts: torch.Tensor  # [B, 2] int64
    target_sizes_hw: torch.Tensor  # [B, 2] int64
    flippeds: list[bool]
    network_multipliers: torch.Tensor  # [B] float32
    custom_attributes: list[dict[str, object]]
    images: torch.Tensor | None = None  # [B, 3, H, W] or [B, 3, F, H, W] in -1..1
    latents: torch.Tensor | None = None  # [B, C, h, w] or [B, C, F, h, w]
    noise: torch.Tensor | None = None
    """of the step, as many numbers as the latents have, where a loader worker has drawn it beforehand"""
    are_reg: list[bool] = field(default_factory=list)
    """which samples are regularisation images; none when empty"""
    latent_seeds: list[int] = field(default_factory=list)
    """for live encoding: the seed of each sample's posterior draw, the same that its cache would have used"""
    facts: list[SampleFacts] = field(default_factory=list)
    """for live encoding: what encoders know of each sample beside its pixels"""
    alpha_masks: torch.Tensor | None = None  # [B, H, W] or [B, F, H, W] weights 0..1, in pixels
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)
    """what samples have beside latents and captions, name -> [B, ...]: control pictures and masks (CONDITIONING_IMAGES,
    [B, 3, H, W] or of clips [B, 3, F, H, W] in -1..1), what the family encodes with latents (`LatentEncoder.condition_shapes`)"""
    conditioning: dict[str, torch.Tensor | list[torch.Tensor]] | None = None
    """cached outputs of text encoders, [B, ...] by name, or a list of B tensors (`TextKey.varlen`); keys that come from
    an encoder in the step are not there"""
    conditioning_keys: tuple[str, ...] = ()
    """all keys of the family, in the order of the list that plug-ins know"""
    input_ids_list: list[torch.Tensor] | None = None
    token_weights_list: list[torch.Tensor] | None = None  # weights of the ids, where captions carry some

    @property
    def text_encoder_outputs_list(self) -> list[torch.Tensor | None] | None:
        """The conditioning as plug-ins know it: a list in the order of the family, None where an output is not
        cached."""
        if self.conditioning is None:
            return None
        return [self.conditioning.get(name) for name in self.conditioning_keys or self.conditioning]

    def __len__(self) -> int:
        return len(self.image_keys)

    @property
    def conditioning_images(self) -> torch.Tensor | None:
        """Masks or control pictures [B, 3, H, W] or [B, 3, F, H, W] in -1..1."""
        return self.conditions.get(CONDITIONING_IMAGES)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def keys(self) -> Iterator[str]:
        yield from (f.name for f in dataclasses.fields(self))
        yield from (CONDITIONING_IMAGES, "text_encoder_outputs_list")

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def rows(self, rows: Sequence[int]) -> Batch:
        """A batch of the samples of these numbers; of `request` items and positions are theirs, the rest is of the
        whole."""

        def listed(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows] if len(values) == len(self) else values

        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "request"}
        places = {name: tuple(listed(list(getattr(self.request, name)))) for name in ("items", "positions")}
        of_samples = ("image_keys", "captions", "flippeds", "custom_attributes", "are_reg", "latent_seeds", "facts")
        return dataclasses.replace(
            self,
            request=dataclasses.replace(self.request, **places),
            **{name: listed(value) if name in of_samples else rows_of(value, rows) for name, value in names.items()}
            | {"conditioning": self.conditioning and conditioning_rows(self.conditioning, rows)},
        )

    def to(self, device: torch.device | str) -> Batch:
        """A copy with all tensors on `device`, but for what is read as numbers, which a device would have to be waited
        for: the network multipliers, tokens, and conditions of whole numbers (places in time). On the CPU, where batches
        are made, it is the batch itself."""
        if torch.device(device).type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return to_device(tensor, device)

        def move_values(tensor: torch.Tensor) -> torch.Tensor:
            return move(tensor) if tensor.is_floating_point() else tensor

        read = ("network_multipliers", "input_ids_list")
        movers = {f.name: move for f in dataclasses.fields(self) if f.name not in read}
        movers["conditions"] = move_values
        return dataclasses.replace(self, **{name: on_tensors(by, getattr(self, name)) for name, by in movers.items()})

    def pin_memory(self) -> Batch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: on_tensors(torch.Tensor.pin_memory, value) for name, value in values.items()}
        )


def on_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A field of a batch with its tensors replaced, be it one, or a list or dict that holds some; others as they
    are."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
        return [on_tensors(function, v) for v in value]
    if isinstance(value, dict):
        return {name: on_tensors(function, v) for name, v in value.items()}
    return value


def conditioning_rows(
    conditioning: Mapping[str, torch.Tensor | list[torch.Tensor]], rows: Sequence[int]
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Some rows of a conditioning, whose lists have an entry for each sample."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else rows_of(value, rows)
        for name, value in conditioning.items()
    }


def rows_of(value: Any, rows: Sequence[int]) -> Any:
    """Some rows of a tensor, or of every tensor of a list or dict."""
    return on_tensors(lambda tensor: tensor[torch.tensor(rows, dtype=torch.int64, device=tensor.device)], value)
