"""A call of each operator of the table: arguments on which what the table says of it can be seen."""

from __future__ import annotations

from typing import Any

import torch


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """From 0.5 to 1.5, no two alike."""
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, ROW, CUBE = values(4, 6), values(4, 6, seed=1), values(6), values(2, 4, 4, 4)
IMAGE = values(2, 4, 6, 6)
EVEN, ODD = torch.tensor([0, 2]), torch.tensor([[1, 3], [0, 2]])
ABOVE = X > 1

# By name: the arguments of a call; None where no call of its own is needed, as it is only ever refused.
MOVES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        """
        alias clone contiguous detach lift_fresh lift_fresh_copy mT numpy_T matrix_H mH ravel resolve_conj resolve_neg t
        fliplr flipud tril triu squeeze unbind diagonal diagonal_copy copy atleast_1d atleast_2d atleast_3d rot90
        """.split(),  # noqa: SIM905
        (X,),
    ),
    "copy": (X, Y),
    "as_strided": (X, (2, 3), (6, 2)),
    "broadcast_to": (ROW, (4, 6)),
    "expand": (ROW, (4, 6)),
    "expand_as": (ROW, X),
    "channel_shuffle": (IMAGE, 2),
    "chunk": (X, 2),
    "unsafe_chunk": (X, 2),
    "tensor_split": (X, 2),
    "hsplit": (X, 2),
    "vsplit": (X, 2),
    "dsplit": (CUBE, 2),
    "split": (X, 2),
    "unsafe_split": (X, 2),
    "split_with_sizes": (X, [1, 3]),
    "unsafe_split_with_sizes": (X, [1, 3]),
    "flatten": (CUBE, 1),
    "unflatten": (X, 1, (2, 3)),
    "flip": (X, [0]),
    "roll": (X, [1], [0]),
    "index": (X, [EVEN]),
    "index_select": (X, 0, EVEN),
    "gather": (X, 0, ODD),
    "take": (X, EVEN),
    "take_along_dim": (X, torch.arange(4)[:, None], 1),
    "masked_select": (X, ABOVE),
    "narrow": (X, 0, 1, 2),
    "narrow_copy": (X, 0, 1, 2),
    "select": (X, 0, 1),
    "slice": (X, 0, 1, 3),
    "permute": (CUBE, (3, 0, 1, 2)),
    "transpose": (X, 0, 1),
    "movedim": (CUBE, 0, 1),
    "pixel_shuffle": (IMAGE, 2),
    "pixel_unshuffle": (IMAGE, 2),
    "repeat": (X, (2, 1)),
    "tile": (X, (2, 1)),
    "repeat_interleave": (X, 2),
    "reshape": (X, (6, 4)),
    "reshape_as": (X, values(6, 4)),
    "view": (X, (6, 4)),
    "view_as": (X, values(6, 4)),
    "_unsafe_view": (X, (6, 4)),
    "unfold": (X, 1, 3, 1),
    "unsqueeze": (X, 0),
    "fill_diagonal": (X.clone(), 2.0),
    **dict.fromkeys(["cat", "stack", "hstack", "vstack", "dstack", "column_stack"], ([X, Y],)),
    "broadcast_tensors": ([ROW, X],),
    "meshgrid": ([ROW, ROW],),
    **dict.fromkeys(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"], (IMAGE, 0.5, False)),
}
