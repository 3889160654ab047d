"""Take out, change or add metadata of a safetensors file; its tensors stay as they are.

    python tools/edit_metadata.py lora.safetensors --strip tags folders --save_to shared.safetensors
    python tools/edit_metadata.py lora.safetensors --thumbnail best.png --set "modelspec.author=Ada" --in_place
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import metadata_edit

    return metadata_edit.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import metadata_edit

    return metadata_edit.main(argv)


if __name__ == "__main__":
    sys.exit(main())
