"""The backend AOTInductor: torch itself compiles the cast program, for any GPU that torch supports."""
