"""Quantization: mixed precision, GPTQ, DWQ."""
