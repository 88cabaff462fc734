"""Other people's checkpoints to folders of this package's format."""
