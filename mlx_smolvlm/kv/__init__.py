"""Keys and values of the tokens that attention has seen."""
