"""Rewrite an adapter file for another program: kohya, PEFT, diffusers, ComfyUI, ai-toolkit, XLabs, LyCORIS.

    python tools/convert_lora.py lora.safetensors for_diffusers.safetensors --to diffusers
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import convert

    return convert.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import convert

    return convert.main(argv)


if __name__ == "__main__":
    sys.exit(main())
