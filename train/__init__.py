"""Trains on a dataset and evaluates the result."""
