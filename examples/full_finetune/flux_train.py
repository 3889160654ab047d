"""Train all weights of a FLUX.1 denoiser.

    python examples/full_finetune/flux_train.py --config_file train.toml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project, where it is not installed

from library.training import cli  # noqa: E402

FAMILY, TRAINABLE = "flux", "examples.full_finetune.full_finetune:FullFinetune"


def setup_parser():
    return cli.build_parser(FAMILY, TRAINABLE)


if __name__ == "__main__":
    cli.main(FAMILY, TRAINABLE)
