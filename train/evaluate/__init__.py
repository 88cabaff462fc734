"""Scores a checkpoint on datasets."""
