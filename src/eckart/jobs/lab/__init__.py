"""Experiments: many training runs, a learning-rate search, paired seeds and statistical tests."""
