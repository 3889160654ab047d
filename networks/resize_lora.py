"""The old name of tools/resize_lora.py, with its old options."""

import sys
from pathlib import Path


def main(argv=None) -> int:
    from tools.lora_tools.old_scripts import run

    return run("resize_lora", argv)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this folder's modules are those of a package
    sys.exit(main())
