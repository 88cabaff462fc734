"""Converts checkpoints from elsewhere to this package's format."""
