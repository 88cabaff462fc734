"""The programs that print the figures of docs/measured.md."""

import mlx_smolvlm  # noqa: F401  (loads OpenBLAS, which works only before mlx.core is imported)
