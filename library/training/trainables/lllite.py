"""ControlNet-LLLite: small networks inside the attention of a U-Net learn to follow a control picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from library.checkpoints.kinds import check_slot
from library.components.lllite_models import VALUE_RANGE, LLLite, LLLiteShape, new_shapes
from library.components.lllite_utils import load_tensors, misfit, read_shapes, read_tensors
from library.core.errors import CheckpointError, ConfigError, Problems, UnsupportedCombination
from library.core.keyed_random import StepDraws, isolated_rng
from library.core.options import Config
from library.generation.control_pictures import open_picture, picture_tensor
from library.training.lllite import DEFAULT_COND_DIM, DEFAULT_DIM, LLLiteOptions
from library.training.optimizers import OptimizerOptions
from library.training.trainables.base import mask_notice
from library.training.trainables.pictures import FollowsPictures
from networks.files.network_files import write_adapter_file

if TYPE_CHECKING:
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import ParamGroup, Plain
    from library.training.run import Models
    from library.training.sampling_prompts import SamplePrompt
    from library.training.wiring.base import ModelFamily


class LLLiteTrainable(FollowsPictures):
    """`net` exists after attach()."""

    name = "lllite"
    options = LLLiteOptions
    script = "train_control_net_lllite"
    spec_kind = "control-net-lllite"
    opts: LLLiteOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._shapes: dict[str, LLLiteShape] | None = None
        """those of --network_weights"""

    # -- before models are loaded ------------------------------------------------------------------------------------

    def check(self, family: ModelFamily) -> None:
        """The rate, and the file to start from: for this base, of these sizes."""
        if self.name not in family.record.scripts:
            raise UnsupportedCombination(f"there are no ControlNet-LLLites of {family.record.title}")
        problems = Problems()
        if not self.config[OptimizerOptions].learning_rate:
            problems.add("--learning_rate is 0: there is nothing to train")
        if self.opts.network_weights:
            problems.attempt(lambda: self._check_file(family))
        problems.raise_if_any()

    def _check_file(self, family: ModelFamily) -> None:
        path = self.opts.network_weights
        problem = check_slot(path, "network_weights", {self.name}, with_pickles=True)
        if problem:
            raise ConfigError(problem)
        try:
            self._shapes = read_shapes(path)
        except CheckpointError as error:
            raise ConfigError(f"--network_weights: {error}") from error
        for option, given, held in (
            ("cond_emb_dim", self.opts.cond_emb_dim, {shape.cond_dim for shape in self._shapes.values()}),
            ("network_dim", self.opts.network_dim, {shape.mlp_dim for shape in self._shapes.values()}),
        ):
            if given is not None and held != {given}:
                sizes = ", ".join(map(str, sorted(held)))
                raise ConfigError(
                    f"--{option} is {given}, --network_weights {path} has {sizes}; give that of the file, or leave"
                    f" --{option} out"
                )
        try:
            found = misfit(path, family.info)
        except CheckpointError:
            return  # of the base, which is told by the family
        if found:
            raise ConfigError(f"--network_weights is {path}: {found}")

    @property
    def _sizes(self) -> tuple[int, int]:
        """(cond_emb_dim, network_dim) of a new network, or of the first module of the file."""
        if self._shapes:
            shape = next(iter(self._shapes.values()))
            return shape.cond_dim, shape.mlp_dim
        return self.opts.cond_emb_dim or DEFAULT_COND_DIM, self.opts.network_dim or DEFAULT_DIM

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        cond_dim, dim = self._sizes
        return {"cond_emb_dim": cond_dim, "network_dim": dim}

    # -- the network -------------------------------------------------------------------------------------------------

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        shapes = self._shapes or new_shapes(models.denoiser, *self._sizes)
        with isolated_rng(0):  # torch draws start values, which are drawn by name below
            self.net = LLLite(models.denoiser, shapes, self.opts.network_dropout or 0.0)
        if self._shapes:
            load_tensors(self.net, read_tensors(self.opts.network_weights), self.opts.network_weights)
        else:
            self.net.initialize(runtime.seed)
        self.net.to(runtime.device, runtime.trained_dtype).requires_grad_(True).train()

    def param_groups(self) -> list[ParamGroup]:
        return [
            {"params": list(self.net.parameters()), "lr": self.config[OptimizerOptions].learning_rate, "name": "lllite"}
        ]

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"lllite": self.net}

    def on_step_start(self, draws: StepDraws) -> None:
        self.net.state.draws = draws

    def inputs(self, batch: Batch, sample: NoisyLatents, conditioning: Conditioning) -> dict[str, object]:
        """The layers follow the pictures of the batch from here on; the denoiser itself is given nothing more."""
        self.net.set_picture(self.pictures_of(batch).to(sample.noisy_latents.device))
        return {}

    @contextmanager
    def at_sample(self, prompt: SamplePrompt) -> Iterator[Mapping[str, object]]:
        """The layers follow the prompt's picture; without one the sample is that of the base model."""
        if prompt.controlnet_image:
            image = open_picture(prompt.controlnet_image, (prompt.width, prompt.height))
            picture = picture_tensor(image, VALUE_RANGE).to(self.net.device)
        else:
            picture = None
        self.net.set_picture(picture)
        try:
            yield {}
        finally:
            self.net.set_picture(None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.net.silent():
            yield

    def description(self) -> str:
        cond_dim, dim = self._sizes
        return f"ControlNet-LLLite of {len(self.net.names)} layers, cond_emb_dim {cond_dim}, network_dim {dim}"

    def notices(self) -> list[str]:
        lines = [] if self._shapes is not None else [
            "a new ControlNet-LLLite changes nothing at the start (known trainers give its last layer random biases,"
            " which change pictures)"
        ]  # fmt: skip
        return [*lines, *(mask_notice(self.net.device) if self.opts.network_dropout else [])]

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        write_adapter_file(path, self.net.state_dict(), dtype, metadata)

    def load(self, path: str) -> None:
        load_tensors(self.net, read_tensors(path), path)

    def metadata(self) -> dict[str, Plain]:
        cond_dim, dim = self._sizes
        return {
            "ss_cond_emb_dim": cond_dim, "ss_network_dim": dim, "ss_network_dropout": self.opts.network_dropout,
        }  # fmt: skip
