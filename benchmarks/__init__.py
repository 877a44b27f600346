"""Speed: our code against reference implementations, as ratios."""
