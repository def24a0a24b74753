"""Hold an engine against the fp32 program: errors, metrics, verdicts, and whose error it is."""
