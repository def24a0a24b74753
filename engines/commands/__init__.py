"""The commands of `calibcast`, each a thin layer over the Python calls."""
