"""`mlx-smolvlm bench`: measures this machine, other programs beside it, and settings of MLX."""
