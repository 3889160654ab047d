"""Tell how much memory a training will need, before it: the table for each size of its batches. No weights are read.

    python tools/plan_memory.py flux_train_network.py --config_file train.toml
    python tools/plan_memory.py --device cuda accelerate launch flux_train_network.py --pretrained_model_name_or_path ...

Behind the options of the tool stands the command of a training script, whole or without what starts it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.model_tools import memory_plan

    return memory_plan.build_parser()


def main(argv=None) -> int:
    from tools.model_tools import memory_plan

    return memory_plan.main(argv)


if __name__ == "__main__":
    sys.exit(main())
