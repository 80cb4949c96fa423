"""Command lines: `python -m launch.sample`, `python -m launch.train`, and so on."""
