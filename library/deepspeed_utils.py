"""Calls around DeepSpeed, which is not there: nothing while it is off, one message while it is on; see
docs/public_names.md."""

from library.compat.accelerator import prepare_deepspeed_args, prepare_deepspeed_model, prepare_deepspeed_plugin  # noqa: F401
from library.compat.arguments import add_deepspeed_arguments  # noqa: F401
