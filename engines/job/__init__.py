"""The offline calibration job: a job file in; artifacts, a manifest and an exit code out."""
