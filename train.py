"""Train anything of any family, also a family or a trainable of your own.

    python train.py flux network --config_file train.toml
    python train.py flux my_package.my_module:MyTrainable --config_file train.toml
"""

import argparse

from library.training import cli


def setup_parser():
    """The two names; what follows are the options of the training (`python train.py flux network --help`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="model family")
    parser.add_argument("trainable", help="what is trained: a name, or a path package.module:class")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the training")
    return parser


def main(argv=None):
    names = setup_parser().parse_args(argv)
    cli.main_with_plugins(names.family, names.trainable, names.options)


if __name__ == "__main__":
    main()
