"""Write the tables of options into documentation pages, from the option groups themselves.

    python tools/document_options.py all                                          the pages of all scripts
    python tools/document_options.py flux network docs/flux_train_network.md      one page

The tables replace what stands between the lines `<!-- options: begin -->` and `<!-- options: end -->` of the page.
`all` writes the table of docs/trainables.md too: what each script has.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.core.options import is_bool_option, option_fields, value_type  # noqa: E402
from library.core.registry import import_target  # noqa: E402
from library.families.registry import FAMILIES, script_name  # noqa: E402
from library.training import cache_tools, clip_cache_options  # noqa: E402
from library.training.option_reader import Script  # noqa: E402
from library.training.parser_common import TRAINABLES, script  # noqa: E402
from networks.kinds.targets import targets_of_family  # noqa: E402

PAGES: dict[tuple[str, str], str] = {
    **{(name, "network"): record.page for name, record in FAMILIES.items() if record.page},
    **{(name, what): other.page for name, record in FAMILIES.items() for what, other in record.scripts.items()},
}
"""(family, trainable) -> the page of the script"""

CACHES_PAGE = "docs/video_caching.md"
"""the page of the tools that fill caches of clips"""

GENERATION_PAGE = "docs/gen_img.md"
"""the page of the image scripts of Stable Diffusion and SDXL"""

VIDEO_ENDING = "_generate_video.py"

TRAINABLES_PAGE = "docs/trainables.md"
"""the page with the table of what can be learned of which family"""
FEATURES: dict[str, tuple[str, ...]] = {
    "text encoders learn": (
        "train_text_encoder", "learning_rate_te", "learning_rate_te1", "text_encoder_lr", "stop_text_encoder_training",
        "token_string",
    ),
    "fused": ("fused_backward_pass",),
    "blockwise": ("blockwise_fused_optimizers",),
    "swap": ("blocks_to_swap",),
    "bf16": ("full_bf16",),
    "fp8 base": ("fp8_base",),
    "text cache": ("cache_text_encoder_outputs",),
    "samples": ("sample_prompts",),
    "validation": ("validation_split",),
    "EMA": ("ema",),
    "masks": ("masked_loss", "alpha_mask"),
    "weighted captions": ("weighted_captions",),
}  # fmt: skip
"""column -> options, of which one that works in a script makes a yes"""

TABLE_HEAD = ("| option | value | default | meaning |", "|---|---|---|---|")
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"


def generation_script() -> Script:
    """The option groups of gen_img.py in the form of a training script."""
    from library.generation.gen_img.script import CLASSES

    return Script("sd", "generation", CLASSES, {}, {})


def video_scripts() -> dict[str, Script]:
    """The option groups of the video scripts in the form of a training script, by family."""
    with_script = {name: record for name, record in FAMILIES.items() if record.pictures.endswith(VIDEO_ENDING)}
    return {
        name: Script(name, "generation", import_target(record.image_script).groups, {}, {})
        for name, record in with_script.items()
    }


def video_page(family: str) -> str:
    """The page of a family's video script."""
    return f"docs/{FAMILIES[family].pictures.removesuffix('.py')}.md"


def tables(what: Script) -> str:
    """One section with a table per option group."""
    sections = []
    for options_class in what.classes:
        rows = [_row(what, options_class, name) for name in option_fields(options_class)]
        title = (options_class.__doc__ or options_class.__name__).strip().splitlines()[0]
        sections.append(
            "\n".join([f"### {title}", "", *TABLE_HEAD, *rows])
        )
    return "\n\n".join(sections)


def cache_tool_tables() -> str:
    """For each tool that fills caches of clips the options that it has beside those of the data set."""
    sections = []
    for family, record in FAMILIES.items():
        if record.clips is None or record.variant_of is not None or record.clips.fps is None:
            continue
        family_class = import_target(record.family)
        for what, part in cache_tools.PARTS.items():
            tool = cache_tools.tool_script(family, what)
            groups = (cache_tools.CacheToolOptions, *clip_cache_options.OPTIONS[what])
            own = {*family_class.part_options[part], "dataset_config", *(["vae"] if what == "latents" else [])}
            names = [name for name, owner in tool.owners.items() if owner in groups or name in own]
            rows = [_row(tool, tool.owners[name], name) for name in names if tool.status(name) != "foreign"]
            title = f"### {record.title}: {'latents' if what == 'latents' else 'text'}"
            sections.append("\n".join([title, "", *TABLE_HEAD, *rows]))
    return "\n\n".join(sections)


def trainables_table() -> str:
    """One row per family and trainable, in the order of the records; a new script has its row by itself."""
    columns = ["family", "what", "script", "saved as", *FEATURES]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for family, trainable in sorted(PAGES, key=lambda pair: list(FAMILIES).index(pair[0])):
        record, what = FAMILIES[family], script(family, trainable)
        name = script_name(family, "train_network") if trainable == "network" else record.scripts[trainable].name
        page = PAGES[family, trainable].removeprefix("docs/")
        marks = ["yes" if any(_works(what, option) for option in options) else "-" for options in FEATURES.values()]
        if trainable == "network" and not targets_of_family(family).text_encoders:
            marks[0] = "-"
        cells = [record.title, f"`{trainable}`", f"[{name}.py]({page})", _forms(family, trainable), *marks]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _works(what: Script, option: str) -> bool:
    return option in what.owners and what.status(option) == "works"


def _forms(family: str, trainable: str) -> str:
    found = TRAINABLES.resolve(trainable)
    of_family = import_target(FAMILIES[family].family)
    has_folder = found.writes_folders and (found.has_own_folder or of_family.writes_folders)
    return "file or folder" if has_folder else "file"


def _row(what: Script, options_class: type, name: str) -> str:
    spec = what.spec(name)
    default = what.default(name)
    shown = "" if default is None or default is False or default == "" else f"`{default}`"
    meaning = spec.help
    status, reason = what.status(name), what.reason(name)
    if status in ("refused", "foreign"):
        meaning += f". **Not available:** {reason}"
    elif status == "ignored":
        meaning += f". **Ignored:** {reason}"
    elif status == "equivalent":
        meaning += f". Accepted without effect; {str(reason).partition(': ')[2]}"
    return f"| `--{name}` | {_cell(_values(options_class, name))} | {_cell(shown)} | {_cell(meaning)} |"


def _values(options_class: type, name: str) -> str:
    _, spec = option_fields(options_class)[name]
    if spec.choices:
        text = ", ".join(str(choice) for choice in spec.choices if choice is not None)
    elif is_bool_option(options_class, name):
        text = "switch"
    elif spec.metavar:
        text = spec.metavar
    else:
        text = {int: "whole number", float: "number"}.get(value_type(options_class, name), "text")
    return f"{text} ..." if spec.nargs == "*" else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def with_tables(page: str, what: Script) -> str:
    """The page with fresh tables between its two marks. Raises ValueError when it has no marks."""
    return between_marks(page, tables(what))


def between_marks(page: str, fresh: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{fresh}\n\n{END}{after}"


def renew(fresh: str, page: Path) -> None:
    page.write_text(between_marks(page.read_text(encoding="utf-8"), fresh), encoding="utf-8")
    print(f"wrote {page}")


def main(argv: list[str]) -> None:
    if argv == ["all"]:
        root = Path(__file__).resolve().parent.parent
        for (family, trainable), page in PAGES.items():
            renew(tables(script(family, trainable)), root / page)
        renew(tables(generation_script()), root / GENERATION_PAGE)
        renew(cache_tool_tables(), root / CACHES_PAGE)
        for family, what in video_scripts().items():
            renew(tables(what), root / video_page(family))
        renew(trainables_table(), root / TRAINABLES_PAGE)
    elif len(argv) == 3:
        renew(tables(script(argv[0], argv[1])), Path(argv[2]))
    else:
        print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
