"""`python -m mlx_smolvlm` is the command `mlx-smolvlm`."""

from mlx_smolvlm.cli.app import main

if __name__ == "__main__":
    main()
