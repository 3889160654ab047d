"""Average the saved files of one adapter training (post-hoc EMA).

    python tools/lora_post_hoc_ema.py lora-step00000100.safetensors lora-step00000200.safetensors lora.safetensors --output_file ema.safetensors
    python tools/lora_post_hoc_ema.py lora-*.safetensors --output_file ema.safetensors --sigma_rel 0.2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import ema

    return ema.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import ema

    return ema.main(argv)


if __name__ == "__main__":
    sys.exit(main())
