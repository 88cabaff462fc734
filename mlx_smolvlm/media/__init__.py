"""Read pictures and videos, cut them into tiles and encode the tiles."""
