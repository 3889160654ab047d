"""What a fresh clone must do: every script answers --help at once, every module can be imported, nothing that is listed
is missing, and no file names a place on somebody's machine."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")
PACKAGES = ("library", "networks", "tools", "finetune")
TOOLS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "finetune")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)
EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples").rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
"""the scripts among them; plug-ins are modules that scripts import"""
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
)
HEAVY = ("torch", "rich", "transformers", "diffusers", "numpy", "accelerate", "safetensors", "cv2", "PIL", "matplotlib",
         "voluptuous")  # fmt: skip

# Runs a script with --help where an import of a heavy package fails. How long it takes is measured by
# `python -m benchmarks help`.
HELP_PROBE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(f"{{name}} is imported for --help")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {folder!r})
sys.argv = [{script!r}, "--help"]
runpy.run_path({script!r}, run_name="__main__")
"""


def probe_help(script: str) -> subprocess.CompletedProcess:
    code = HELP_PROBE.format(heavy=HEAVY, folder=str((ROOT / script).parent), script=str(ROOT / script))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS, *EXAMPLES])
def test_help_answers_without_a_heavy_import(script):
    result = probe_help(script)
    assert result.returncode == 0, result.stderr
    assert Path(script).name in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_offers_its_parser_to_other_programs(script):
    assert importlib.import_module(script.removesuffix(".py")).setup_parser() is not None


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module):
    importlib.import_module(module)


def tracked_files() -> list[Path]:
    """Files under version control; without git, all text files of the known folders."""
    try:
        names = (
            subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
            .stdout.decode()
            .split("\0")
        )
        found = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not found:
        folders = (*PACKAGES, "tests", "docs", "examples", ".ai", "assets")
        found = [
            path
            for folder in folders
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return found


TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".cfg", ".ini", ""}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt|tmp)/[\w.-]+|\b[A-Z]:\\\\?Users\\", re.ASCII)
EXAMPLE_PATHS = ("/tmp/tiny_base", "/home/someone")


def test_no_file_names_a_place_on_a_machine():
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES or path == Path(__file__).resolve() or "golden" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            hits = [hit for hit in MACHINE_PATH.findall(line) if not hit.startswith(EXAMPLE_PATHS)]
            found += [f"{path.relative_to(ROOT)}:{number}: {hit}" for hit in hits]
    assert not found, "\n".join(found)


def test_links_in_the_documentation_lead_to_files():
    broken = []
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".ai").rglob("*.md"),
        *(ROOT / "assets").rglob("*.md"),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def setup_arguments() -> dict:
    """What setup.py hands to setuptools."""
    code = "import setuptools, json, runpy\nsetuptools.setup = lambda **a: print(json.dumps(a))\nrunpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_setup_lists_every_package_and_script():
    pytest.importorskip("setuptools")
    listed = setup_arguments()
    packages = {name for name in MODULES if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
    assert set(listed["packages"]) == packages
    assert {f"{name}.py" for name in listed["py_modules"]} == set(SCRIPTS)
    assert {"wandb", "dev"} <= set(listed["extras_require"])
    assert not [line for line in listed["install_requires"] if re.match(r"(torchvision|open-clip-torch|timm)\b", line)]


def test_every_folder_with_modules_is_a_package():
    missing = {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert not missing


def test_the_demo_names_files_that_are_there():
    import toml

    config = toml.load(ROOT / "examples/demo/train.toml")
    dataset = toml.load(ROOT / "examples/demo/dataset.toml")
    model = config["model"]
    paths = [model[key] for key in ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "tokenizer_cache_dir")]
    paths += [config["dataset"]["dataset_config"], config["output"]["sample_prompts"]]
    paths += [subset["image_dir"] for part in dataset["datasets"] for subset in part["subsets"]]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for subset in (subset for part in dataset["datasets"] for subset in part["subsets"]):
        pictures = list((ROOT / subset["image_dir"]).glob("*.png"))
        assert pictures and all(path.with_suffix(".txt").is_file() for path in pictures)
