"""Rewrite a model between one file in the original layout and a diffusers folder.

    python tools/convert_model.py model.safetensors model_folder --to diffusers
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.model_tools import convert

    return convert.build_parser()


def main(argv=None) -> int:
    from tools.model_tools import convert

    return convert.main(argv)


if __name__ == "__main__":
    sys.exit(main())
