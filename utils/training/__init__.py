"""One run, from its flags to its last epoch."""
