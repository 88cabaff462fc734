"""Turns messages and media into token ids."""
