"""Keeps what was computed for a prompt and finds it again."""
