"""Making a program fit a low type by exact powers of two, found from its ranges."""
