"""`python -m mlx_smolvlm.train.recipe`: see `run.py`."""

from mlx_smolvlm.train.recipe.run import main

if __name__ == "__main__":
    main()
