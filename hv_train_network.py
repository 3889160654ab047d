"""Train a LoRA-type network for HunyuanVideo."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="hunyuan_video", trainable="network")


if __name__ == "__main__":
    cli.main(family="hunyuan_video", trainable="network")
