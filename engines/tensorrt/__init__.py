"""TensorRT through Torch-TensorRT: build, remedies when the builder fails, the cache, engines as files."""
