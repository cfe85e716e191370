"""Presets: one YAML file of settings per model and machine, named on the command line with ``--config``."""
