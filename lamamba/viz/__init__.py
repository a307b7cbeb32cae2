"""Pictures of results: grids, films, curves."""
