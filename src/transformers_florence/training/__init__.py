"""Mechanisms of training: precision, optimisation."""
