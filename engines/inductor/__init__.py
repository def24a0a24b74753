"""AOTInductor as a backend: the cast program compiled by torch itself, for any GPU that torch supports."""
