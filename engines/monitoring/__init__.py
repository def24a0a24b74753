"""An engine watched in service: its inputs and outputs beside what calibration saw."""
