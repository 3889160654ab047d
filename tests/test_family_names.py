"""A family is named by its record and its own modules alone: shared code asks the records (library/families)."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from library.families.registry import records

ROOT = Path(__file__).resolve().parent.parent
NAMES = tuple(records())
SHARED_BY_FEW: dict[str, tuple[str, ...]] = {
    "what the families with a U-Net share": (
        "library/components/unet_*.py", "library/components/ldm_*.py", "library/checkpoints/unet_*.py",
        "library/checkpoints/ldm_*.py",
        "library/generation/unet_*.py", "library/generation/gen_img/*.py",
        "library/strategy_ldm.py", "library/tiny_models/unet_*.py",
        "library/training/wiring/unet.py", "networks/files/unet_*.py", "networks/kinds/block_weights.py",
        "tools/caption_tools/buckets.py",
        "tools/image_tools/upscale.py",
    ),
    "of one family, by another name": (
        "networks/files/xlabs_names.py", "networks/oft_flux.py", "tools/tiny_base/*.py",
    ),
    "converts checkpoints of the families that it names": ("tools/model_tools/convert.py", "tools/model_tools/old_names.py"),
    "names and options of other programs": (
        "library/training/known_options_table.py", "library/config_util.py", "tools/lora_tools/old_names.py",
        "tools/lora_tools/old_scripts.py",
    ),
    "public names that people import": ("library/compat/*.py",),
}  # fmt: skip
"""reason -> files that may name families beside their own modules"""
KNOWN_TO_USERS = (
    "flux_shift", "qinglong_flux", "flux2_shift", "--flux_model", "networks.oft_flux", "flux_kontext_no_resize_control",
)
"""values of options and modules that are called after a family and mean no family"""


def is_own(file: str) -> bool:
    """Whether a file belongs to one family by its name, or is a script."""
    stem = Path(file).stem
    named = any(stem in (name, f"strategy_{name}", f"lora_{name}") or stem.startswith(f"{name}_") for name in NAMES)
    return named or file.count("/") == 0 or (file.count("/") == 1 and file.startswith(("tools/", "networks/")))


def shared_files() -> list[str]:
    folders = [ROOT / name for name in ("library", "networks", "tools", "finetune")]
    files = sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py"))
    patterns = [pattern for group in SHARED_BY_FEW.values() for pattern in group]
    return [file for file in files if not is_own(file) and not any(fnmatch(file, pattern) for pattern in patterns)]


def named_in(text: str) -> list[str]:
    """Names of families in a text, as words, as parts of words with underscores, and at the beginning of class
    names."""
    for known in KNOWN_TO_USERS:
        text = text.replace(known, "")
    long = [name for name in NAMES if name != "sd"]  # two letters that a state dict has too: as a value alone
    words = "|".join(re.escape(name).replace("_", "[_ ]?") for name in long)
    classes = "|".join("".join(part.capitalize() for part in name.split("_")) for name in NAMES)
    pattern = rf"(?<![A-Za-z0-9])(?i:{words})\d?(?![A-Za-z0-9])|(?<![A-Za-z])({classes})(?=[A-Z][a-z])|[\"']sd[\"']"
    return [match[0] for match in re.finditer(pattern, text)]


@pytest.mark.parametrize("file", shared_files())
def test_shared_code_names_no_family(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [
        f"{file}:{number}: {', '.join(names)}" for number, line in enumerate(lines, 1) if (names := named_in(line))
    ]
    assert not found, (
        "\n".join(found) + "\nA fact of a family belongs to its record; docs/architecture.md tells where what stands."
    )


def test_the_exceptions_are_needed():
    for patterns in SHARED_BY_FEW.values():
        for pattern in patterns:
            files = [path for path in ROOT.glob(pattern)]
            assert any(named_in(path.read_text(encoding="utf-8")) for path in files), (
                f"{pattern} names no family (any more)"
            )


@pytest.mark.parametrize("line", [
    'if family == "flux":', "from library.flux_utils import x", "class FluxThing:", "SDXL has two", "x = 'sd'",
    "the HunyuanImage layout",
    "FLUX.1 or Chroma", "sd3_state", "hunyuan_image",
])  # fmt: skip
def test_a_name_is_seen(line):
    assert named_in(line)


@pytest.mark.parametrize(
    "line",
    ["influx", "weights_sd", "sd-scripts", "fluxes", "--timestep_sampling flux_shift", "animate", "want", "wander"],
)
def test_other_words_are_not(line):
    assert not named_in(line)
