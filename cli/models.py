"""`mlx-smolvlm models`: what can be named, and what has been converted."""

from __future__ import annotations

from mlx_smolvlm.cli.render import size, table, write, write_json


def models(as_json: bool) -> None:
    """Put the aliases and the converted checkpoints on stdout."""
    from mlx_smolvlm.hub import ALIASES, cache_folder, list_cached

    cached = list_cached()
    if as_json:
        write_json(
            {
                "aliases": ALIASES,
                "cache_folder": str(cache_folder()),
                "converted": [
                    {
                        "name": model.name,
                        "path": str(model.path),
                        "bits": model.bits,
                        "nbytes": model.nbytes,
                        "source": model.source,
                    }
                    for model in cached
                ],
            }
        )
        return
    rows = [("alias", "model"), ("demo", "bundled with this package"), *ALIASES.items()]
    text = table(rows)
    if cached:
        converted = [("converted", "bits", "size", "from")]
        converted += [
            (str(model.path), str(model.bits), size(model.nbytes), model.source) for model in cached
        ]
        text += "\n" + table(converted)
    write(text)
