"""What trainables have in common whose nets follow control pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import TrainingError
from library.generation.control_pictures import open_picture
from library.training.trainables.base import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from library.dataset.batch import Batch
    from library.training.sampling_prompts import SamplePrompt


class FollowsPictures(Trainable):
    """The base of trainables that learn from the control pictures of batches, and follow those that sample prompts name
    (--cn)."""

    sample_reads = frozenset({"controlnet_image"})

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        if prompt.controlnet_image:
            open_picture(prompt.controlnet_image)
        return prompt

    @staticmethod
    def pictures_of(batch: Batch) -> Tensor:
        """[B, 3, H, W] in -1..1. TrainingError for a batch without, which a dataset of the user's own may give."""
        if batch.conditioning_images is None:
            raise TrainingError("a batch has no conditioning images, from which nets that follow pictures learn")
        return batch.conditioning_images
