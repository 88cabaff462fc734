"""Reads and writes checkpoint folders of this package's format."""
