"""Image scripts whose pictures can be written as latents, and that make pictures of latents."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.core.options import Config, option_fields
from library.generation.adapter_files import MergedModelOptions
from library.generation.picture_files import write_picture
from library.generation.preview_options import PreviewOptions
from library.generation.requests import Request, SessionOptions
from library.generation.script import ImageScript, unused_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.generation.pipeline import PictureMaker, PicturePipeline

logger = logging.getLogger(__name__)

OF_DECODING = frozenset({None, "prompt", "fps"})
"""options of requests that decoding looks at or refuses; None is the option of a field without one"""


class LatentScript(ImageScript[Request]):
    """`pictures` has `prompt`, `save_path`, `output_type` and `latent_path`, `adapters` is a ListedAdapterOptions."""

    option_names: ClassVar[Mapping[str, str]] = {"steps": "infer_steps", "cfg_scale": "guidance_scale"}
    size_option = "image_size"

    @abstractmethod
    def load_decoder(self, config: Config) -> tuple[PicturePipeline[Any], torch.device]:
        """A pipeline without a denoiser, and where it computes."""

    def save_merged(self, config: Config, target: str) -> None:
        """Write the denoiser with the adapters in it, where the script has MergedModelOptions."""
        raise NotImplementedError

    def make_all(self, config: Config) -> list[Path]:
        target = config[MergedModelOptions].save_merged_model if MergedModelOptions in config else None
        if not target and not config[self.pictures].latent_path:
            return self.make_from_prompts(config)
        self._check_all(config)
        for name in self._sampling_options(config):
            logger.info("--%s has no effect: nothing is sampled", name)
        if not target:
            return self.decode_files(config)
        self.save_merged(config, target)
        logger.info("%s", target)
        return [Path(target)]

    def _sampling_options(self, config: Config) -> list[str]:
        """Options that were written and say what is sampled, or how."""
        fields = (field.name for field in dataclasses.fields(self.base_request(config)))
        of_requests = {self._option_of(name) for name in fields} - OF_DECODING
        found = {*of_requests, *option_fields(PreviewOptions), "prompt_weighting", "prompt_wildcards"}
        return sorted(name for name in found & config.explicit if config.value(name) not in (None, False, 0))

    def writes_pictures(self, config: Config) -> bool:
        return config[self.pictures].output_type != "latent"

    def make_from_prompts(self, config: Config) -> list[Path]:
        return super().make_all(config)

    def write(
        self, maker: PictureMaker[Request], config: Config, latents: Tensor, path: Path, texts: Mapping[str, str]
    ) -> Path:
        """The picture, its latents, or both; the path of the picture where there is one."""
        output_type = config[self.pictures].output_type
        if output_type != "images":
            from library.generation.latent_files import save_latents

            written = save_latents(latents, path.with_name(f"{path.stem}_latent.safetensors"), texts)
            if output_type == "latent":
                return written
        return super().write(maker, config, latents, path, texts)

    def decode_files(self, config: Config) -> list[Path]:
        """Pictures of the files of --latent_path: `{YYYYmmdd_HHMMSS}_{index}_{name of the file}.png`."""
        from library.generation.latent_files import read_latents

        pictures, paths = config[self.pictures], []
        pipeline, device = self.load_decoder(config)
        for index, source in enumerate(pictures.latent_path):
            latents, texts = read_latents(source, pipeline.latent_spec)
            ending = f"_{Path(source).stem.removesuffix('_latent')}{config[SessionOptions].picture_ending}"
            texts = {} if config[SessionOptions].no_metadata else texts
            picture = pipeline.decode(latents.to(device))
            path = unused_path(pictures.output_dir, None, index, ending)
            paths.append(write_picture(picture, path, texts, config[SessionOptions].image_quality))
            logger.info("%s", paths[-1])
        return paths

    # -- checks --------------------------------------------------------------------------------------------------------

    def prompt_problems(self, config: Config, *, is_fp8: bool) -> list[str]:
        """What contradicts itself or is missing of prompts, latents and adapters. `is_fp8`: the denoiser is kept in 8
        bits."""
        pictures, session, adapters, found = config[self.pictures], config[SessionOptions], config[self.adapters], []
        if not pictures.save_path:
            found.append(f"--save_path is not given; needed: the folder for the {self.kind}s")
        from_elsewhere = session.interactive or session.from_file
        if pictures.latent_path and session.from_metadata:
            found.append("--latent_path decodes latents that are there; leave out --from_metadata")
            return found
        if pictures.latent_path and (from_elsewhere or pictures.prompt):
            found.append(
                "--latent_path decodes latents that are there; leave out --prompt, --from_file and --interactive"
            )
        if not (pictures.prompt is not None or from_elsewhere or pictures.latent_path):
            found.append("--prompt is not given; needed: it, --from_file, --interactive or --latent_path")
        if adapters.lora_weight and is_fp8 and adapters.lycoris:
            found.append(
                "--lycoris needs whole weights; with --fp8 or --fp8_scaled leave it out,"
                " our own modules read the same files"
            )
        return found

    def extra_file_problems(self, config: Config) -> list[str | None]:
        """Files of adapters and latents, and the package that --lycoris asks for."""
        from importlib.util import find_spec

        from library.generation.adapter_files import file_problem

        adapters, pictures = config[self.adapters], config[self.pictures]
        found = [file_problem(path, "lora_weight", self.family) for path in adapters.lora_weight or ()]
        found += [
            f"--latent_path is {path}: there is no such file"
            for path in pictures.latent_path or ()
            if not Path(path).is_file()
        ]
        if adapters.lycoris and find_spec("lycoris") is None:
            found.append("--lycoris needs the package lycoris-lora: pip install lycoris-lora")
        return found
