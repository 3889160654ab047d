"""Write captions beside images by GIT.

    python finetune/make_captions_by_git.py images --model_id git --remove_words
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import git

    return git.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import git

    return git.main(argv)


if __name__ == "__main__":
    sys.exit(main())
