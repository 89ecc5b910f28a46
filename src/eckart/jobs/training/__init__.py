"""A settled job in motion: model, trainer, checkpoints, what is watched, and how it ends."""
