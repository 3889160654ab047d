"""The files of --base_weights, which are added to the models' weights before anything is encoded or trained."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from library.errors import ConfigError
from library.model_identity import combined_identity, model_identity
from networks.lora import create_text_encoder_network
from networks.network_files import by_module, read_adapter_file
from networks.targets import NetworkTargets

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime
    from library.training.run import Models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFile:
    """One file, under kohya names."""

    path: str
    multiplier: float
    tensors: dict[str, torch.Tensor]
    targets: NetworkTargets

    @cached_property
    def is_lora(self) -> bool:
        return all({"lora_down.weight", "lora_up.weight"} <= set(part) for part in by_module(self.tensors).values())

    def part(self, *, of_text_encoders: bool) -> dict[str, torch.Tensor]:
        """The tensors of one side."""
        return {key: t for key, t in self.tensors.items() if (self.targets.encoder_of(key) is not None) == of_text_encoders}


class BaseWeights:
    """Merges the files: into text encoders when these are loaded, so that cached outputs are those of the merged ones; into the
    denoiser when the network is attached. LoRA is merged by our own code, which keeps the multiplier; other kinds by the
    network module, which needs all models at once."""

    def __init__(self, paths: Sequence[str], multipliers: Sequence[float], targets: NetworkTargets) -> None:
        self._wanted = [(path, multipliers[i] if i < len(multipliers) else 1.0) for i, path in enumerate(paths)]
        self._targets = targets
        self._is_in_text_encoders = False

    @cached_property
    def files(self) -> list[BaseFile]:
        return [BaseFile(path, factor, read_adapter_file(path, self._targets), self._targets) for path, factor in self._wanted]

    def text_identity(self) -> str:
        """Stands for the change of the text encoders; "" when there is none."""
        parts = [
            f"{model_identity(file.path)} times {file.multiplier:g}"
            for file in self.files
            if file.is_lora and file.multiplier and file.part(of_text_encoders=True)
        ]
        return combined_identity(parts) if parts else ""

    def merge_text_encoders(self, text_encoders: Sequence[torch.nn.Module | None]) -> None:
        """Once, into encoders as they were loaded."""
        self._is_in_text_encoders = True
        for file in self.files:
            tensors = file.part(of_text_encoders=True)
            if file.is_lora and tensors:
                network = create_text_encoder_network(self._targets, file.multiplier, text_encoders, tensors, file.path)
                network.merge_to(list(text_encoders), None, tensors)
                logger.info(
                    "%s is merged into the text encoders; cached outputs are made with it (other trainers cache those of the"
                    " encoders without it)", file.path,
                )  # fmt: skip

    def merge(self, module: Any, models: Models, runtime: Runtime) -> None:
        """The rest, when all models are there; the files' tensors are given up."""
        if not self._is_in_text_encoders and any(encoder is not None for encoder in models.text_encoders):
            self.merge_text_encoders(models.text_encoders)
        for file in self.files:
            logger.info("merging %s with multiplier %g", file.path, file.multiplier)
            if file.is_lora:
                self._merge_denoiser(file, models, runtime)
            else:
                self._merge_by_module(file, module, models, runtime)
        del self.files

    @staticmethod
    def _merge_denoiser(file: BaseFile, models: Models, runtime: Runtime) -> None:
        tensors = file.part(of_text_encoders=False)
        if not tensors:
            return
        maker = importlib.import_module("networks.lora")
        network, weights = maker.create_network_from_weights(
            file.multiplier, file.path, models.vae, [], models.denoiser, weights_sd=tensors, for_inference=True
        )
        network.merge_to([], models.denoiser, weights, None, runtime.device)

    @staticmethod
    def _merge_by_module(file: BaseFile, module: Any, models: Models, runtime: Runtime) -> None:
        is_own = hasattr(module, "check_network_args")
        encoders = list(models.text_encoders) if is_own else [e for e in models.text_encoders if e is not None]
        if file.part(of_text_encoders=True) and not any(encoder is not None for encoder in encoders):
            raise ConfigError(
                f"--base_weights {file.path} changes text encoders by adapters other than LoRA; their outputs are cached before."
                " Leave --cache_text_encoder_outputs out"
            )
        network, weights = module.create_network_from_weights(
            file.multiplier, file.path, models.vae, encoders, models.denoiser, weights_sd=file.tensors, for_inference=True
        )
        network.merge_to(encoders, models.denoiser, weights, None if is_own else runtime.weight_dtype, runtime.device)
