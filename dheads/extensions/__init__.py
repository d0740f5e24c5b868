"""Beyond the paper, one file an idea."""
