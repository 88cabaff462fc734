"""`python -m demo_recipe`: see `run.py`."""

from demo_recipe.run import main

if __name__ == "__main__":
    main()
