"""Tell what is in an adapter file: for which model, kinds, ranks, norms by block, and what is wrong with it.

    python tools/check_lora.py lora.safetensors
    python tools/check_lora.py lora.safetensors --plot norms.png --weights
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import inspection

    return inspection.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import inspection

    return inspection.main(argv)


if __name__ == "__main__":
    sys.exit(main())
