"""Experiments: many runs, searched learning rates, paired seeds, and a verdict from numbers."""
