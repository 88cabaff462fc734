"""Reads images and videos and encodes them."""
