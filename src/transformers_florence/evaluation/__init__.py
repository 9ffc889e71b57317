"""Evaluation: classification, retrieval and its second stage, detection, answers, captions, clips, and results."""
