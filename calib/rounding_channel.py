"""A program's graph cut down to one channel of one result, to measure what rounding does to that channel alone.

The noise of an output is a mean over its channels, and a budget is held to the worst. Where one channel is much noisier
than most, as a class that only a few frames have, the edges that make its noise are not those that make the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.output_noise import channel_dimension, channel_power
from torch import fx


def ending_in_channel(graph_module: fx.GraphModule, place: int, channel: int, expected: torch.Tensor) -> fx.GraphModule:
    """A copy of a flat graph whose only result is one channel of result `place`, in one dimension.

    expected: what the program gives there in the batch to be measured. A number is put behind the channel's elements,
    so that their power is that which its noise is divided by (`channel_power`).
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    results: Any = graph.graph_copy(graph_module.graph, copies)
    dimension = channel_dimension(expected)
    power = channel_power(expected)[channel]
    part = expected if dimension is None else expected.select(dimension, channel)
    own = torch.where(part.isfinite(), part, 0.0).double().square().sum()
    copied = fx.GraphModule(graph_module, graph)
    copied.register_buffer("rest_of_power", (power - own).clamp(min=0).sqrt().reshape(1).to(expected.dtype))
    chosen = results[place]
    if dimension is not None:
        chosen = graph.call_function(torch.ops.aten.select.int, (chosen, dimension, channel))
    flat = graph.call_function(torch.ops.aten.reshape.default, (chosen, [-1]))
    rest = graph.get_attr("rest_of_power")
    graph.output((graph.call_function(torch.ops.aten.cat.default, ([flat, rest],)),))
    copied.recompile()
    return copied
