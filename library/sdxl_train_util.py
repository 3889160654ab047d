"""Training of SDXL as other trainers call it; see docs/public_names.md."""

from library.compat.arguments import add_sdxl_training_arguments, verify_sdxl_training_args  # noqa: F401
from library.compat.samples import sample_images_sdxl as sample_images  # noqa: F401
from library.compat.sdxl_names import get_size_embeddings, get_timestep_embedding, load_target_model, load_tokenizers  # noqa: F401
