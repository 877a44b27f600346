"""Shared code of both scripts, and the commands that users type."""
