"""Print the metadata of a safetensors file as JSON.

    python tools/show_metadata.py --model lora.safetensors
    python tools/show_metadata.py lora.safetensors --decode
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import metadata

    return metadata.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import metadata

    return metadata.main(argv)


if __name__ == "__main__":
    sys.exit(main())
