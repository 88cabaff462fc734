"""Evaluation: the accuracy of a checkpoint on datasets."""
