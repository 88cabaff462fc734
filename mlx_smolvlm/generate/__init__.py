"""Generates answers: from prompt and images to tokens and text."""
