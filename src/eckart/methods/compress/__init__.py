"""Weights of a trained model -> fewer, in one shot. One file per method."""
