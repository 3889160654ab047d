"""What the families with a U-Net and a noise schedule (Stable Diffusion 1 and 2, SDXL) have in common: options and
wiring."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from library.core.errors import CheckpointError, Problems
from library.training import timestep_samplers
from library.training.inference_samplers import SamplerOptions, check_sampler, check_sd_table, sampler_notices
from library.training.option_groups import ModelOptions, NoiseOptions, SamplingOptions
from library.training.sampling_prompts import SamplePrompt, with_defaults
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import DENOISER, ModelFamily, foreign_to_ddpm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.components.ldm_utils import AutoEncoderInfo
    from library.components.unet_utils import UNetInfo
    from library.dataset.latent_cache import LatentCache
    from library.training.accelerator_setup import Runtime
    from library.training.objective import Objective
    from library.training.run import Models

logger = logging.getLogger(__name__)

POSITION_IDS = ".position_ids"
"""0, 1, 2 ...: some files hold them and nothing reads them"""


def foreign_to_unet(model: str) -> dict[str, str]:
    """What no script of a family with a U-Net has: name -> reason, for its `foreign`. `model` is its name in
    messages."""
    swap = f"the U-Net of {model} has no row of equal blocks to swap"
    return {
        **foreign_to_ddpm(model),
        "blocks_to_swap": f"{swap}; --gradient_checkpointing saves memory",
        "block_swap_ring_size": swap,
    }


class UNetFamily(ModelFamily):
    """Files, prediction type, latents and sampling. A subclass says what its checkpoints and text encoders are."""

    read_values = {"timestep_sampling": timestep_samplers.is_own}
    refused = {"mixed_precision_transformer": "the denoiser is a U-Net, which computes in one type"}
    kinds: ClassVar[frozenset[str]]
    """kinds of checkpoints (library/checkpoints/kinds.py) that the family trains"""

    @cached_property
    @abstractmethod
    def info(self) -> UNetInfo:
        """What the header of the base tells; CheckpointError when it is something else."""

    def base_info(self) -> UNetInfo:
        return self.info

    @cached_property
    @abstractmethod
    def vae_info(self) -> AutoEncoderInfo:
        """The autoencoder: of --vae, or the base's own."""

    @abstractmethod
    def text_problems(self) -> list[str]:
        """What is wrong with text encoders and tokenizers."""

    def check(self) -> None:
        problems = Problems()
        for problem in [*self._denoiser_problems(), *self.part_problems("vae"), *self.part_problems("text_encoders")]:
            if problem not in problems.messages:
                problems.add(problem)
        problems.attempt(self.check_timesteps)
        given = self.config[SamplerOptions]
        problems.attempt(lambda: self._check_sampler(given.sample_sampler, "--sample_sampler"))
        table = given.sample_sigma_table
        problems.attempt(lambda: check_sd_table(table, "--sample_sigma_table", given.sample_sampler))
        problems.raise_if_any()
        for line in self.notices():
            logger.info(line)

    def _denoiser_problems(self) -> list[str]:
        problem = slot_problem(self.base_path, "pretrained_model_name_or_path", set(self.kinds))
        if problem:
            return [problem]
        try:
            return self.declared_problems(self.info)
        except CheckpointError as error:
            return [about_slot("pretrained_model_name_or_path", self.base_path, error)]

    def declared_problems(self, info: UNetInfo) -> list[str]:
        """What the file says of itself against the options."""
        if info.prediction_type == "v" and not self.is_v:
            return [f"{self.base_path} says that it predicts velocity; add --v_parameterization"]
        return []

    def part_problems(self, part: str) -> list[str]:
        slot, path, kinds = "pretrained_model_name_or_path", self.base_path, set(self.kinds)
        if part == "vae" and self.config[ModelOptions].vae:
            slot, path, kinds = "vae", self.config[ModelOptions].vae, {"vae_sd", *self.kinds}
        problem = slot_problem(path, slot, kinds)
        if problem:
            return [problem]
        if part == "text_encoders":
            return self.text_problems()
        try:
            channels = self.vae_info.params.z_channels
        except CheckpointError as error:
            return [about_slot(slot, path, error)]
        wanted = self.architecture.latents.channels
        return (
            []
            if channels == wanted
            else [f"--{slot} is {path}: its autoencoder has {channels} latent channels; {wanted} are needed"]
        )

    def notices(self) -> list[str]:
        """Lines for the log where a setting has no effect or differs from what the file says."""
        lines = []
        if self.is_v and self.info.prediction_type == "epsilon":
            lines.append(
                f"--v_parameterization: {self.base_path} says that it predicts noise; it will be changed to predict velocity"
            )
        if self.info.zero_terminal_snr and not self.config[NoiseOptions].zero_terminal_snr:
            lines.append(
                f"{self.base_path} says that it was trained with a zero-terminal schedule; --zero_terminal_snr is not set"
            )
        if SamplingOptions in self.config and self.config[SamplingOptions].sample_prompts:
            lines += sampler_notices(
                self.config[SamplerOptions].sample_sampler, is_v=self.is_v,
                zero_terminal_snr=self.config[NoiseOptions].zero_terminal_snr
            )
        return lines

    @property
    def base_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def vae_path(self) -> str | None:
        return self.config[ModelOptions].vae or self.base_path

    @property
    def is_v(self) -> bool:
        return self.config[ModelOptions].v_parameterization

    @property
    def disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def latents_caching(self) -> LatentCache:
        from library.strategy_ldm import LdmLatentEncoder

        return self.latent_cache(LdmLatentEncoder(), self.vae_path)

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.components.ldm_utils import load_autoencoder

        return load_autoencoder(self.vae_info, runtime.vae_dtype, runtime.device, self.disable_mmap)

    def stored_unet(self, load: Callable[..., torch.nn.Module], runtime: Runtime) -> torch.nn.Module:
        """The U-Net of the base, in the form of the run: linear layers and convolutions."""
        from library.components.stored_parts import stored_model

        form = runtime.denoiser_form
        dtype = runtime.weight_dtype if form else runtime.denoiser_dtype
        return stored_model(
            lambda place: load(self.base_path, dtype, place, self.disable_mmap, transform=self.transform),
            form, runtime.device, convolutions=True,
        )  # fmt: skip

    @abstractmethod
    def file_tensors(
        self, denoiser: torch.nn.Module | None, text_encoders: Sequence[torch.nn.Module] | None,
        vae: torch.nn.Module | None,
    ) -> dict[str, torch.Tensor]:
        """Weights of the parts that are given, under their names in a file of the original layout."""

    @abstractmethod
    def base_denoiser(self) -> torch.nn.Module:
        """That of the base as its file has it, on the CPU; the same for the text encoders below."""

    @abstractmethod
    def base_text_encoders(self) -> list[torch.nn.Module]: ...

    def save_model(
        self, models: Models, path: str, dtype: torch.dtype | None, metadata: dict[str, str],
        parts: Collection[str] = DENOISER,
    ) -> None:
        """One file: that of the base, with what has learned, and the autoencoder of --vae, in the place of its own. A
        base in the layout of diffusers becomes a file in the original layout. What has not learned is read again: in
        memory it may be rounded, or gone."""
        import torch

        from library.checkpoints.rewriting import holds_all, write_replaced
        from library.components.ldm_folder_files import untold_config
        from library.safetensors_utils import cast_all, save_file_atomic

        self.check_parts(parts, ("denoiser", "text_encoders"))
        denoiser = models.denoiser if "denoiser" in parts else None
        text_encoders = self._text_of_file(models, parts)
        other_vae = self._base_vae() if self.config[ModelOptions].vae else None
        changed = self.file_tensors(denoiser, text_encoders, other_vae)
        known = self.info.source.shapes
        own = {key: tensor for key, tensor in changed.items() if key in known or not key.endswith(POSITION_IDS)}
        if holds_all(self.info.source, own):
            write_replaced(self.info.source, own, path, dtype, metadata)
            return
        whole = self.file_tensors(
            denoiser or self.base_denoiser(), text_encoders or self.base_text_encoders(), other_vae or self._base_vae()
        )
        is_zero_snr = self.config[NoiseOptions].zero_terminal_snr or self.info.zero_terminal_snr
        marks = {"v_pred": self.is_v, "ztsnr": is_zero_snr}
        whole |= {mark: torch.zeros(0) for mark, is_set in marks.items() if is_set}
        config = untold_config(self.base_path, self.file_kind, self.vae_info.params, whole)
        whole = {key: tensor.contiguous() for key, tensor in cast_all(whole, dtype).items()}
        save_file_atomic(whole, path, {**metadata, **config})

    writes_folders = True

    @property
    @abstractmethod
    def file_kind(self) -> str:
        """Kind of the base (library/checkpoints/kinds.py)."""

    @abstractmethod
    def folder_tokenizer(self) -> PreTrainedTokenizerBase:
        """The CLIP tokenizer that a folder holds."""

    def save_folder(
        self, models: Models, path: str, dtype: torch.dtype | None, metadata: dict[str, str],
        parts: Collection[str] = DENOISER, *, pickled: bool = False,
    ) -> None:
        from library.components.ldm_folder_files import SCHEDULER, keep_scheduler, read_single, write_folder
        from library.core.atomic_file import scratch_path

        prediction = "v" if self.is_v else "epsilon"
        with scratch_path(path) as place:
            place.mkdir()
            try:
                file = str(place / "model.safetensors")
                self.save_model(models, file, dtype, metadata, parts)
                folder = read_single(file, self.file_kind, prediction)
                if self.config[NoiseOptions].zero_terminal_snr:
                    folder.configs[SCHEDULER]["rescale_betas_zero_snr"] = True
                keep_scheduler(folder, self.base_path)
                write_folder(folder, self.folder_tokenizer(), path, None, pickled=pickled)
            finally:
                shutil.rmtree(place, ignore_errors=True)

    def _text_of_file(self, models: Models, parts: Collection[str]) -> list[torch.nn.Module] | None:
        """The text encoders that have learned, with the others as the base has them; None when none has."""
        own = models.text_encoders
        learned = [i for i in range(len(own)) if {"text_encoders", f"text_encoders.{i}"} & set(parts)]
        if not learned:
            return None
        base = self.base_text_encoders() if len(learned) < len(own) else own
        return [own[i] if i in learned else base[i] for i in range(len(own))]

    def _base_vae(self) -> torch.nn.Module:
        from library.components.ldm_utils import load_autoencoder

        return load_autoencoder(self.vae_info, None, "cpu", self.disable_mmap)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.vae_info.params.scaling_factor

    def objective(self) -> Objective:
        from library.training.objective import DdpmObjective

        return DdpmObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], prediction_type="v" if self.is_v else "epsilon"
        )

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        """512 px, 30 steps, CFG 7.5, the sampler of --sample_sampler; both sides are rounded down to a multiple of
        8."""
        name = prompt.sample_sampler or self.config[SamplerOptions].sample_sampler
        self._check_sampler(name, "a sample prompt's sampler")
        table = self.sigma_table_of(prompt)
        check_sd_table(table, "a sample prompt's table of noise levels", name)
        return dataclasses.replace(with_defaults(prompt, self.sampling), sample_sampler=name, sigma_table=table)

    @staticmethod
    def _check_sampler(name: str, what: str) -> None:
        check_sampler(name, what)

    def pipeline_settings(self) -> Mapping[str, object]:
        objective = self.objective()
        return {"prediction_type": objective.prediction_type, "zero_terminal_snr": objective.zero_terminal_snr}


def about_slot(slot: str, path: str | None, error: CheckpointError) -> str:
    """What is wrong with a file, told as what is wrong with an option."""
    text = str(error)
    for start, instead in ((f"{path} ", "it "), (f"{path}: ", "")):
        if text.startswith(start):
            return f"--{slot} is {path}: {instead}{text.removeprefix(start)}"
    return f"--{slot} is {path}: {text}"


def slot_problem(path: str | None, slot: str, kinds: set[str], *, for_pictures: bool = False) -> str | None:
    """`check_slot` that takes the .ckpt files of these families too: they are opened as data, which runs no code."""
    from library.checkpoints.kinds import check_slot

    return check_slot(path, slot, kinds, with_pickles=True, for_pictures=for_pictures)
