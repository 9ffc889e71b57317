"""Evaluation of dual encoders: zero-shot classification and retrieval."""
