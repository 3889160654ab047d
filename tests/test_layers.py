"""The import layers of the code base, read from the source: a module may import, at module level, only from its own row
of the table in docs/architecture.md or from rows above it; families are strangers to each other and to shared code."""

from __future__ import annotations

import ast
import sys
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import pytest

from library.families.registry import records

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("library", "networks", "tools", "finetune")

OF_A_FAMILY = tuple(f"{name}_{kind}" for name in records() for kind in ("util", "model_util", "train_util"))
PUBLIC_NAMES_ALONE = (
    "custom_train_functions", "deepspeed_utils", "model_util", "hunyuan_image_text_encoder", *OF_A_FAMILY,
)  # fmt: skip
# Pattern -> row; the first match counts. A new file that no pattern knows fails the test: say where it belongs.
LAYERS: tuple[tuple[str, int], ...] = (
    # 8: names of other trainers, and the modules at known paths that are nothing else; see
    # test_only_known_paths_lead_to_public_names
    ("library/compat/*.py", 8), *((f"library/{name}.py", 8) for name in PUBLIC_NAMES_ALONE),
    # 6: wiring and scripts, found by name, never imported by shared code
    ("library/training/wiring/base.py", 5), ("library/training/wiring/flow.py", 5),
    ("library/training/wiring/unet.py", 5),
    ("library/training/wiring/video*.py", 5),
    ("library/training/wiring/*.py", 6), ("library/training/cli.py", 6),
    ("library/generation/*_inference.py", 6), ("library/generation/*script.py", 6),
    ("library/generation/gen_img/script.py", 6),
    ("library/scripts/*.py", 6), ("library/train_util.py", 6),
    ("tools/*.py", 6), ("finetune/*.py", 6), ("*.py", 6),
    # 7: the inside of a tool or script, which imports it in its functions
    ("tools/*/*.py", 7),
    # 0: core, tables, and records without tensors
    ("library/__init__.py", 0), ("networks/__init__.py", 0), ("library/*/__init__.py", 0),
    ("library/*/*/__init__.py", 0),
    ("networks/*/__init__.py", 0), ("library/core/*.py", 0), ("library/families/*.py", 0),
    ("library/generation/gen_img/dynamic_prompts.py", 0),
    ("library/components/framepack_sections.py", 0), ("library/generation/framepack_requests.py", 0),
    ("library/generation/requests.py", 0), ("library/generation/*_requests.py", 0),
    ("library/generation/adapter_files.py", 0),
    ("library/generation/*_options.py", 0),
    ("library/generation/gen_img/options.py", 0), ("library/generation/gen_img/prompts.py", 0),
    ("library/training/sampling_prompts.py", 0),
    ("library/training/option_groups.py", 0), ("library/training/option_reader.py", 0),
    ("library/training/option_bounds.py", 0), ("library/training/computing_options.py", 0),
    ("library/training/alignment/options.py", 0),
    ("library/training/config_file.py", 0), ("library/training/attention_options.py", 0),
    ("library/training/keyword_args.py", 0), ("library/training/timestep_samplers/modes.py", 0),
    ("library/training/known_options*.py", 0),
    # 1: building blocks
    ("library/utils.py", 1), ("library/device_utils.py", 1), ("library/attention.py", 1),
    ("library/custom_offloading_utils.py", 1), ("library/components/device_transfers.py", 1),
    ("library/components/block_ring.py", 1), ("library/components/activation_offload.py", 1),
    ("library/*_models.py", 1), ("library/*_vae.py", 1),
    ("library/components/*_models.py", 1), ("library/components/tiling.py", 1),
    ("library/components/attention_backends.py", 1), ("library/components/packed_tokens.py", 1),
    ("library/components/block_calls.py", 1),
    ("library/checkpoints/number_formats.py", 1),
    ("library/generation/image_grid.py", 1), ("library/generation/prompt_weighting.py", 1),
    # 4 by name, before the wider pattern of row 2
    ("library/*_train_utils.py", 4), ("library/lora_utils.py", 4),
    # 2: files and checkpoints, and parts that several families share
    ("library/checkpoints/*.py", 2), ("library/components/*.py", 2), ("library/*_utils.py", 2),
    ("library/huggingface_util.py", 2),
    ("library/sai_model_spec.py", 2), ("library/tiny_models/*.py", 2), ("library/generation/picture_files.py", 2),
    # 3: strategies and data
    ("library/strategy_*.py", 3), ("library/dataset/*.py", 3), ("library/dataset/clips/*.py", 3),
    ("library/config_util.py", 3),
    # 4: numerics and adapters
    ("networks/*.py", 4), ("networks/*/*.py", 4), ("library/training/objective.py", 4),
    ("library/training/timesteps.py", 4),
    ("library/generation/*.py", 4), ("library/generation/gen_img/*.py", 4),
    ("library/training/optimizers/*.py", 4), ("library/training/schedulers/*.py", 4),
    ("library/training/losses/*.py", 4),
    ("library/training/loss_weights/*.py", 4), ("library/training/timestep_samplers/*.py", 4),
    ("library/training/inference_samplers/*.py", 4), ("library/training/adapters/*.py", 4),
    # 5: the training line
    ("library/training/*.py", 5), ("library/training/*/*.py", 5),
)  # fmt: skip

KNOWN = [name for name, record in records().items() if record.family or record.variant_of]
"""families that have files of their own"""
FAMILY_BY_PLACE = {  # where the name does not tell
    "tools/tiny_base": "flux", "library/model_util.py": "sd",
    **{record.pictures: name for name, record in records().items() if record.pictures.endswith("_generate_video.py")},
}  # fmt: skip
ALLOWED_OUTSIDE = {0: {"toml"}, 1: {"torch", "einops", "numpy", "PIL"}, 6: {"toml"}}
HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "safetensors",
    "accelerate",
    "einops",
    "cv2",
    "PIL",
    "matplotlib",
}
NEVER = {"torchvision", "open_clip", "diffusers", "timm"}


def source_files() -> list[str]:
    """Every Python file of the project but tests and setup.py, relative to the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += [path for path in ROOT.glob("*.py") if path.name != "setup.py"]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def layer_of(file: str) -> int | None:
    return next(
        (layer for pattern, layer in LAYERS if pattern.count("/") == file.count("/") and fnmatch(file, pattern)), None
    )


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(nodes: list[ast.stmt]) -> list[str]:
    """Dotted names imported by these statements and the blocks in them, functions and TYPE_CHECKING left out."""
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If):
            names += imports_of(node.orelse if is_type_checking(node.test) else node.body + node.orelse)
        elif isinstance(node, ast.Try):
            names += imports_of(node.body + node.orelse + node.finalbody + [s for h in node.handlers for s in h.body])
        elif isinstance(node, (ast.With, ast.ClassDef)):
            names += imports_of(node.body)
    return names


@lru_cache(maxsize=None)
def imports_of_file(file: str) -> tuple[str, ...]:
    return tuple(imports_of(ast.parse((ROOT / file).read_text(encoding="utf-8")).body))


def project_file(name: str) -> str | None:
    """The project's file behind a dotted name (`library.utils.setup_logging` -> library/utils.py), or None."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / candidate).is_file() and candidate in SOURCE_SET:
                return candidate
    return None


FILES = source_files()
SOURCE_SET = frozenset(FILES)


def family_of_file(file: str) -> str | None:
    """The family that a file belongs to by its name, or None for shared code: parts of several families among it,
    whatever they are called."""
    stem = Path(file).stem
    if file.startswith("library/components/"):
        return None
    for family in KNOWN:
        own_name = stem in (f"strategy_{family}", f"lora_{family}") or stem.startswith(f"{family}_")
        if own_name or file in (f"library/families/{family}.py", f"library/training/wiring/{family}.py"):
            return family
    return FAMILY_BY_PLACE.get(file) or FAMILY_BY_PLACE.get(file.rpartition("/")[0])


def heavy_at_module_level(file: str) -> list[str]:
    return sorted({name.split(".")[0] for name in imports_of_file(file)} & HEAVY)


@pytest.mark.parametrize("file", FILES)
def test_every_module_has_a_row(file):
    assert layer_of(file) is not None, f"{file} is in no row; add it to LAYERS"


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_from_its_row_or_above(file):
    own = layer_of(file)
    below = []
    for name in imports_of_file(file):
        imported = project_file(name)
        if imported is not None and imported != file and layer_of(imported) > own:
            below.append(f"{imported} (row {layer_of(imported)})")
    assert not below, f"{file} (row {own}) imports {', '.join(below)}"


@pytest.mark.parametrize("file", [file for file in FILES if layer_of(file) in ALLOWED_OUTSIDE])
def test_outer_rows_import_only_what_the_table_allows(file):
    own = layer_of(file)
    outside = {name.split(".")[0] for name in imports_of_file(file) if project_file(name) is None}
    foreign = outside - set(sys.stdlib_module_names) - set(PACKAGES) - ALLOWED_OUTSIDE[own]
    assert not foreign, f"{file} (row {own}) imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("file", [file for file in FILES if layer_of(file) == 6])
def test_wiring_imports_nothing_heavy(file):
    """--help answers at once because nothing heavy is reached, over any number of steps, while the module is
    imported."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        assert not heavy_at_module_level(current), (
            f"{file} reaches {current}, which imports {heavy_at_module_level(current)}"
        )
        for name in imports_of_file(current):
            imported = project_file(name)
            if imported is not None:
                packages = [
                    f"{'/'.join(imported.split('/')[:depth])}/__init__.py"
                    for depth in range(1, imported.count("/") + 1)
                ]
                waiting += [imported, *(package for package in packages if package in SOURCE_SET)]


@pytest.mark.parametrize("file", FILES)
def test_families_are_strangers(file):
    """But for a variant, which stands on the files of the family whose scripts it is chosen in."""
    own = family_of_file(file)
    variant_of = records()[own].variant_of if own else None
    for name in imports_of_file(file):
        imported = project_file(name)
        other = family_of_file(imported) if imported is not None else None
        assert other in (None, own, variant_of and variant_of[0]), (
            f"{file} imports {imported}, which belongs to the family {other}"
        )


@pytest.mark.parametrize("file", FILES)
def test_only_known_paths_lead_to_public_names(file):
    """Our own code does not use the names of other trainers: library.compat appears in itself and in what hands its
    names on."""
    hands_on = file.count("/") == 0 or file.rpartition("/")[0] in ("library/compat", "library", "networks")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert hands_on or "library.compat" not in text, f"{file} names library.compat"
    if hands_on and layer_of(file) != 8:  # by text, looked up when it is asked for
        tree = ast.parse(text)
        inside = [
            node
            for scope in ast.walk(tree)
            if isinstance(scope, (ast.FunctionDef, ast.ClassDef))
            for node in scope.body
        ]
        assert not [name for name in imports_of([*tree.body, *inside]) if name.startswith("library.compat")]


@pytest.mark.parametrize("file", FILES)
def test_packages_that_break_environments_are_not_imported(file):
    assert not {name.split(".")[0] for name in imports_of_file(file)} & NEVER


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("networks/")])
def test_networks_do_not_know_training(file):
    assert not [name for name in imports_of_file(file) if name.startswith("library.training")]


def all_imports_of(node: ast.AST) -> list[str]:
    """Dotted names imported anywhere in it, functions included, TYPE_CHECKING left out."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return imports_of([node])
    inner = node.orelse if isinstance(node, ast.If) and is_type_checking(node.test) else ast.iter_child_nodes(node)
    return [name for child in inner for name in all_imports_of(child)]


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Sets of modules that reach each other: the strongly connected components of two and more, by Tarjan's
    algorithm."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []
    found: list[frozenset[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        open_modules.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
            if other in open_modules:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            place = open_modules.index(module)
            if len(open_modules) - place > 1:
                found.append(frozenset(open_modules[place:]))
            del open_modules[place:]

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def test_no_modules_import_each_other_not_even_inside_functions():
    graph = {}
    for file in FILES:
        names = all_imports_of(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        graph[file] = {found for name in names if (found := project_file(name)) not in (None, file)}
    found = [sorted(circle) for circle in circles(graph)]
    assert not found, f"import each other: {found}"


def test_circles_are_found_over_any_number_of_modules():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f", "a"}}
    assert circles(graph) == [frozenset("abc"), frozenset("fg")]
    function = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    if x:\n        import b\n"
    )
    assert all_imports_of(function) == ["typing.TYPE_CHECKING", "b"]


def test_the_reader_of_imports_sees_what_it_should():
    source = (
        "import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\nelse:\n    import toml\n"
        "try:\n    import a\nexcept ImportError:\n    import b\ndef f():\n    import c\nclass K:\n    import d\n"
    )
    names = imports_of(ast.parse(source).body)
    assert names == ["torch", "typing.TYPE_CHECKING", "toml", "a", "b", "d"]
