"""How the bundled demo was trained."""

import mlx_smolvlm  # noqa: F401  (loads OpenBLAS, which works only before mlx.core is imported)
