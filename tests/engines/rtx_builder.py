"""Ask the real TensorRT-RTX builder, in this process, whether it accepts the program in a .pt2 file.

    python tests/engines/rtx_builder.py mixed.pt2

Prints the size of the engine in bytes. Works without a GPU, as TensorRT-RTX builds ahead of time: stand-ins answer
what Torch-TensorRT asks of torch.cuda, and the deserialising of the finished engine, which needs a GPU, is left out.
Run as a child: the builder may crash, and the stand-ins must not outlive the question.
"""

import sys

import torch

STAND_INS = {
    "get_device_capability": lambda *_: (9, 0),
    "current_device": lambda: 0,
    "mem_get_info": lambda *_: (1 << 35, 1 << 35),
    "get_device_name": lambda *_: "none",
}


class Unread:
    """Stands for an engine that was built and is not deserialised."""

    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data

    def get_aliased_input_tensor(self, _):
        return None


class Runtime:
    def __init__(self, *_):
        pass

    def deserialize_cuda_engine(self, data):
        return Unread(data)


def main(path):
    for name, answer in STAND_INS.items():
        if not torch.cuda.is_available():
            setattr(torch.cuda, name, answer)
    import torch_tensorrt
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter

    _TRTInterpreter.trt.Runtime = Runtime
    program = torch.export.load(path)
    kinds = program.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [torch_tensorrt.Input(shape=tuple(values[name].shape), dtype=values[name].dtype) for name in kinds]
    engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program, arg_inputs=tuple(inputs), min_block_size=1
    )
    print("engine bytes:", len(bytes(engine)))


if __name__ == "__main__":
    main(sys.argv[1])
