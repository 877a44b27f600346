"""Processes, errors, signals, files and text. Imports nothing else of this project."""
