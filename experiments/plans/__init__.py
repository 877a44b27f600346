"""Plans of experiments, one per file."""
