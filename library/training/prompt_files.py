"""The files that sample prompts name: looked at before a run, since a picture that is missing would be told at every
occasion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from library.core.errors import ConfigError
from library.core.options import shortened
from library.dataset.media_utils import ImageFileError, decode_image
from library.training.sampling_prompts import LineOption, SamplePrompt


def check_files(
    prompt: SamplePrompt, options: Mapping[str, LineOption], first_frames: Callable[[str], Iterable[str]]
) -> None:
    """ConfigError that names every picture of a video prompt that cannot be read, and a control clip that is not there.
    `first_frames`: the files of an `image_path`, which may name one for each section."""
    paths = {
        "image_path": first_frames(prompt.image_path) if prompt.image_path else (),
        "end_image_path": filter(None, [prompt.end_image_path]), "control_image_path": prompt.control_image_path or (),
    }  # fmt: skip
    letters = {entry.field: letter for letter, entry in options.items()}
    problems = []
    for field, path in ((field, path) for field, given in paths.items() for path in dict.fromkeys(given)):
        try:
            decode_image(path)
        except ImageFileError as error:
            problems.append((field, str(error)))
    if prompt.control_video_path and not os.path.exists(prompt.control_video_path):
        problems.append(("control_video_path", f"{prompt.control_video_path} does not exist"))
    if problems:
        told = shortened(prompt.prompt)
        raise ConfigError(
            [f"the sample prompt '{told}': --{letters.get(field, field)}: {problem}" for field, problem in problems]
        )
