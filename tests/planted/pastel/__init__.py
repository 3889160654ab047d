"""A small family of models as a package of its own: what a user would install beside the trainer."""
