"""What a made file tells of how it was made: the options of its script and the settings of its prompt line, enough to
make it again. Plain data without torch; `recorded_files.py` reads it back.

The entry ENTRY of a file's texts is one JSON object:

    {"script": "gen_img.py", "options": {"steps": 20, "seed": 7, ...}, "line": {"multipliers": [0.5]}}

`options` are those that the command line would have; `line` holds what a prompt line set and no option can.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import ConfigError
from library.core.options import Config, option_fields
from library.core.plugins import PluginOptions
from library.training.option_groups import ConsoleOptions

ENTRY = "atelier-settings"
NOT_RECORDED = frozenset({
    "no_metadata", "metadata_file_names", "from_metadata", "interactive", "from_file", "output_dir", "save_path",
    "outdir", "output_type", "prompt_wildcards", "latent_path", "save_merged_model", "device", "keep_pngs",
    "preview_latent_every", "preview_vae", "optimized",
})  # fmt: skip
"""options that say where prompts come from, which files are written where, and what computes; not what is made. What --optimized sets is
recorded in its place"""


@dataclass(frozen=True)
class RecordedSettings:
    """The settings of one made file."""

    script: str
    options: Mapping[str, Any]
    line: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As ENTRY has it: the same settings are the same text."""
        return json.dumps(
            {"script": self.script, "options": self.options, "line": self.line}, ensure_ascii=False, sort_keys=True
        )

    @classmethod
    def of_text(cls, text: str, where: str) -> RecordedSettings:
        """ConfigError for a text that holds none."""
        try:
            found = json.loads(text)
            parts = found["script"], found["options"], found["line"]
        except (ValueError, KeyError, TypeError, RecursionError):
            parts = None, None, None
        if not (isinstance(parts[0], str) and isinstance(parts[1], dict) and isinstance(parts[2], dict)):
            raise ConfigError(f"{where} has an entry {ENTRY} that is damaged; needed: as the scripts write it")
        return cls(*parts)

    @property
    def words(self) -> list[str]:
        """The command line that asks for the same, as far as options can."""
        found = ["python", self.script]
        for name, value in self.options.items():
            if isinstance(value, list):
                found += [f"--{name}", *map(str, value)]
            else:
                found.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
        return found

    @property
    def command(self) -> str:
        return shlex.join(self.words)

    def without_folders(self) -> RecordedSettings:
        """With files named without their folders."""
        return RecordedSettings(self.script, _names_alone(self.options), _names_alone(self.line))


def shaping_options(config: Config, always: Iterable[str] = ()) -> dict[str, Any]:
    """Name -> value of the options that were written, or differ from their defaults, and shape what is made. `always`:
    further ones."""
    found = {}
    for group in config.classes():
        if group is ConsoleOptions:
            continue
        for name, (declared, spec) in option_fields(group).items():
            value = config.value(name)
            told = name in config.explicit or name in always or value != declared.default
            if told and value is not None and not spec.secret and spec.status == "works" and name not in NOT_RECORDED:
                found[name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(isinstance(part, (str, int, float, bool)) for part in (value if isinstance(value, list) else [value]))


def _names_alone(values: Mapping[str, Any]) -> dict[str, Any]:
    def bare(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [bare(part) for part in value]
        return file_name_alone(value) if isinstance(value, str) else value

    return {name: value if "prompt" in name else bare(value) for name, value in values.items()}


def file_name_alone(text: str) -> str:
    """A text with the files and folders in it without the folders before them: `models/a.safetensors;0.8` becomes
    `a.safetensors;0.8`."""
    if os.path.exists(text):
        return os.path.basename(os.path.normpath(text)) or text
    parts = re.split(r"([;=])", text)
    return "".join(os.path.basename(part) if os.path.exists(part) else part for part in parts)


CODE_OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(option_fields(PluginOptions), "imports modules"),
    "highres_fix_upscaler": "imports a module",
    "network_module": "imports a module",
}
"""options that run code of the place where a picture is made again, which a picture of others must not choose"""
