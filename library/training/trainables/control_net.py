"""Training of ControlNets: a net beside the frozen denoiser learns to guide it by pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from library.checkpoints.kinds import check_slot
from library.components.control_models import Control, GuidedBy
from library.components.control_nets import ControlNets, control_nets_of
from library.core.atomic_file import atomic_folder
from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.keyed_random import keyed_generator
from library.core.learning_rates import Rates, parse_rates, rate_groups
from library.generation.control_pictures import control_of_picture
from library.safetensors_utils import cast_all, save_file_atomic, save_pickled_atomic
from library.training.checkpoint import FOLDER_FORMATS
from library.training.control_nets import ControlNetOptions
from library.training.option_groups import ModelOptions, SavingOptions
from library.training.trainables.pictures import FollowsPictures
from library.training.trainables.weights import WeightsTrainable

if TYPE_CHECKING:
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import ParamGroup, Plain
    from library.training.run import Models
    from library.training.sampling_prompts import SamplePrompt
    from library.training.wiring.base import ModelFamily

LEGACY_RANGE = (-1.0, 1.0)
PART = "control_net"
"""its name among the parts of the model"""


class ControlNetTrainable(FollowsPictures, WeightsTrainable):
    """All weights of a ControlNet; the denoiser stays as it is."""

    name, options, script = "control_net", ControlNetOptions, "train_control_net"
    spec_kind = "controlnet"
    begins_with = "--controlnet_model_name_or_path"
    writes_folders = has_own_folder = True
    opts: ControlNetOptions
    rate_options = "--learning_rate, --control_net_lr and --layer_lrs"
    _is_disabled = False

    # -- before models are loaded ------------------------------------------------------------------------------------

    def check(self, family: ModelFamily) -> None:
        """Rates and ways to update, as for whole models; the file to go on with."""
        nets, problems = control_nets_of(family.name), Problems()
        for message in self.update_problems():
            problems.add(message)
        rates = problems.attempt(lambda: self._rates(family))
        if rates is not None:
            problems.attempt(lambda: self.check_used_rates([rate for _, rate in rates]))
        if self.opts.controlnet_model_name_or_path:
            problems.attempt(lambda: self._check_file(family, nets))
        problems.raise_if_any()

    def _check_file(self, family: ModelFamily, nets: ControlNets) -> None:
        path = self.opts.controlnet_model_name_or_path
        problem = check_slot(path, "controlnet_model_name_or_path", set(nets.kinds), with_pickles=True)
        if problem:
            raise ConfigError(problem)
        try:
            params = family.base_info().params
        except CheckpointError:
            return  # of the base, which is told by the family
        try:
            nets.check(path, params)
        except CheckpointError as error:
            raise ConfigError(f"--controlnet_model_name_or_path: {error}") from error

    def _rates(self, family: ModelFamily) -> Rates:
        """Those that the user wrote, before that of the layers that the base does not have."""
        rate, new = self.opts.control_net_lr, "|".join(map(re.escape, control_nets_of(family.name).new_layers))
        own = [] if rate is None else [(re.compile(f"^(?:{new})"), rate)]
        return [*parse_rates(self.opts.layer_lrs, "layer_lrs"), *own]

    # -- the models --------------------------------------------------------------------------------------------------

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        super().attach(family, models, runtime)
        self.nets = control_nets_of(family.name)
        base, mmap = family.base_info(), self.config[ModelOptions].disable_mmap_load_safetensors
        path, place = self.opts.controlnet_model_name_or_path, (runtime.trained_dtype, runtime.device)
        if path:
            self.net = self.nets.load(path, base.params, *place, mmap)
        else:
            generator = keyed_generator(runtime.seed, "new ControlNet")
            self.net = self.nets.made_from(base, generator, *place, mmap)
        models.denoiser.requires_grad_(False)
        models.extra[PART] = self.net.train()

    def param_groups(self) -> list[ParamGroup]:
        """Parameters of rate 0 are frozen: they would collect gradients that nobody uses."""
        return rate_groups(self.net.named_parameters(), self.rate, self._rates(self.family), name=PART)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {PART: self.net}

    @property
    def picture_range(self) -> tuple[float, float]:
        """Darkest and brightest value of the pictures that the net sees."""
        return LEGACY_RANGE if self.opts.conditioning_range == "legacy" else self.nets.picture_range

    def inputs(self, batch: Batch, sample: NoisyLatents, conditioning: Conditioning) -> dict[str, object]:
        if self._is_disabled:
            return {}
        low, high = self.picture_range
        picture = (self.pictures_of(batch) + 1) / 2 * (high - low) + low  # [B, 3, H, W]
        return {"control": Control((GuidedBy(self.net, picture),))}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The denoiser is as it was; inside, nothing guides it."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield
        finally:
            self._is_disabled = before

    @contextmanager
    def at_sample(self, prompt: SamplePrompt) -> Iterator[Mapping[str, object]]:
        """Without a picture the sample is that of the denoiser alone."""
        if not prompt.controlnet_image:
            yield {}
            return
        size = (prompt.width, prompt.height)
        yield {"control": control_of_picture(self.net, prompt.controlnet_image, size, self.picture_range)}

    def description(self) -> str:
        start = self.opts.controlnet_model_name_or_path or "the base model"
        return f"a ControlNet, which starts from {start}"

    def notices(self) -> list[str]:
        lines = super().notices()
        if self.opts.conditioning_range == "legacy":
            lines.append(
                "conditioning images are -1 to 1 (--conditioning_range legacy); programs that use the net give 0 to 1"
            )
        elif "conditioning_range" in self.family.record.scripts[self.name].options:
            lines.append(
                "conditioning images are 0 to 1, as programs that use the net give them (-1 to 1 in known trainers);"
                " --conditioning_range legacy goes on with nets of those"
            )
        if self.nets.new_notice and not self.opts.controlnet_model_name_or_path:
            lines.append(self.nets.new_notice)
        return lines

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        """In the names that files of the family have; a folder is that of diffusers."""
        layout = self.config[SavingOptions].save_model_as
        if layout in FOLDER_FORMATS:
            self._save_folder(path, dtype, metadata, is_pickled=layout == "diffusers")
            return
        state = _plain(cast_all(self.nets.file_state(self.net), dtype))
        if not path.endswith(".ckpt"):
            save_file_atomic(state, path, {**metadata, **self.nets.file_metadata(self.net)})
            return
        save_pickled_atomic(state, path)

    def _save_folder(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], is_pickled: bool) -> None:
        state = _plain(cast_all(self.nets.diffusers_state(self.net), dtype))
        with atomic_folder(path) as folder:
            config = json.dumps(self.nets.diffusers_config(self.net), indent=2, sort_keys=True)
            (folder / "config.json").write_text(config + "\n", encoding="utf-8")
            if is_pickled:
                save_pickled_atomic(state, folder / "diffusion_pytorch_model.bin")
            else:
                save_file_atomic(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt", **metadata})

    def load(self, path: str) -> None:
        raise ConfigError(f"{path} is a ControlNet, with which a run begins as --controlnet_model_name_or_path")

    def metadata(self) -> dict[str, Plain]:
        given = {
            "ss_control_net_lr": self.opts.control_net_lr, "ss_layer_lrs": self.opts.layer_lrs,
            "ss_conditioning_range": "{:g} to {:g}".format(*self.picture_range),
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def _plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
