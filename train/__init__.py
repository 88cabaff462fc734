"""Fine-tuning on a dataset, and evaluation of checkpoints."""
