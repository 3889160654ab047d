"""Write captions beside images by BLIP.

    python finetune/make_captions.py images --caption_weights blip --beam_search --num_beams 3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import blip

    return blip.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import blip

    return blip.main(argv)


if __name__ == "__main__":
    sys.exit(main())
