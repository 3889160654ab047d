"""Models that are put into fewer bits after they were read: text encoders and U-Nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from library.checkpoints.loading import keeping_forms
from library.fp8_optimization_utils import store_layers

Model = TypeVar("Model", bound=nn.Module)
Place = torch.device | str


def stored_model(
    load: Callable[[Place], Model], form: str | None, device: Place, *, convolutions: bool = False
) -> Model:
    """The model that `load` reads to a place, on `device`, with the matrices of its layers in a form, one of
    weight_forms.FORMS, or as they are (None); embeddings, norms and biases keep their type.

    It is read to main memory, from where one weight after another goes to the device, so that the whole model is never
    there; weights that the file has in this form stay as they are.
    """
    if form is None:
        return load(device)
    with keeping_forms(form):
        model = load("cpu")
    store_layers(model, form, device=device, convolutions=convolutions)
    return model.to(device)
