"""Running a training job: model, trainer, checkpoints, metrics and results."""
