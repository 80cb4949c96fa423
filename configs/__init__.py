"""Experiments: each file defines `get_config(variant="") -> Experiment`."""
