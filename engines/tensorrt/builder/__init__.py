"""The child process that builds, and the only files that import `torch_tensorrt`."""
