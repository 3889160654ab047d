"""Train a whole HunyuanVideo denoiser."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="hunyuan_video", trainable="full")


if __name__ == "__main__":
    cli.main(family="hunyuan_video", trainable="full")
