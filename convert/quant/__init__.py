"""Quantization: recipes, mixed precision, GPTQ, DWQ."""
