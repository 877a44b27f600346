"""Processes, errors, signals and files: imports nothing else of this project."""
