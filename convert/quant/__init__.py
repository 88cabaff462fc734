"""Quantization that is calibrated on samples: mixed precisions, GPTQ and DWQ."""
