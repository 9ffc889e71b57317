"""Mechanisms of training: objectives, precision, optimisation, checkpoints, stability, tracking."""
