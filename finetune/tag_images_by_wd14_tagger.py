"""Write tags beside images by an ONNX model.

    python finetune/tag_images_by_wd14_tagger.py images --model_dir tagger --remove_underscore
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import tagger

    return tagger.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import tagger

    return tagger.main(argv)


if __name__ == "__main__":
    sys.exit(main())
