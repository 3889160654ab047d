"""The name by which older commands know `tools/convert_lora.py SRC DST --to comfy --family hunyuan_image`; --reverse is
--to kohya."""

import sys
from pathlib import Path


def main(argv=None) -> int:
    from tools.lora_tools.old_names import convert_hunyuan_image_lora_to_comfy

    return convert_hunyuan_image_lora_to_comfy(argv)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose modules have names of their own
    sys.exit(main())
