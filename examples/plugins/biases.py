"""A trainable: the biases of the denoiser and nothing else (BitFit), a file of a few kilobytes.

    python train.py flux examples.plugins.biases:BiasTrainable --config_file train.toml

The file holds the trained biases under their names in the model, so that it can be laid over it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.core.errors import ConfigError
from library.core.options import option
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training.optimizers import OptimizerOptions
from library.training.trainables.base import Trainable


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    """Biases"""

    bias_weights: str | None = option(None, help="file of biases to go on from")


class BiasTrainable(Trainable):
    name = "biases"
    options = BiasOptions

    def check(self, family) -> None:
        """Everything that can be wrong before a model is loaded, in one ConfigError."""
        if self.opts.bias_weights and not self.opts.bias_weights.endswith(".safetensors"):
            raise ConfigError(f"--bias_weights is {self.opts.bias_weights}; a safetensors file is needed")

    def attach(self, family, models, runtime) -> None:
        """Models are loaded and frozen: choose what learns. Trained numbers are float32."""
        self.biases = {name: bias for name, bias in models.denoiser.named_parameters() if name.endswith(".bias")}
        for bias in self.biases.values():
            bias.data = bias.data.float()
            bias.requires_grad_(True)
        if self.opts.bias_weights:
            self.load(self.opts.bias_weights)

    def param_groups(self):
        return [
            {"params": list(self.biases.values()), "lr": self.config[OptimizerOptions].learning_rate, "name": "biases"}
        ]

    def modules(self):
        """What a state holds, and what is averaged over processes."""
        return {"biases": torch.nn.ParameterList(self.biases.values())}

    def save(self, path, dtype, metadata) -> None:
        tensors = {name: bias.detach().cpu().to(dtype or bias.dtype).contiguous() for name, bias in self.biases.items()}
        save_file_atomic(tensors, path, metadata or None)

    @torch.no_grad()
    def load(self, path) -> None:
        for name, tensor in load_safetensors(path, device="cpu").items():
            self.biases[name].copy_(tensor)

    def metadata(self):
        return {}
