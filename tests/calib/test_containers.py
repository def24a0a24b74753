"""Programs whose inputs and outputs are held in classes that files, or other processes, do not know."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib.artifacts import load_program, save_program
from calibcast.calib.errors import ArtifactError
from calibcast.calib.execution import output_names
from calibcast.calib.pt2.containers import with_plain_containers
from torch.utils import _pytree as pytree

X = torch.arange(8.0).reshape(2, 4)
Pair = namedtuple("Pair", "low high")


def exported(function: Callable[[torch.Tensor], Any]) -> torch.export.ExportedProgram:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    return torch.export.export(Module().eval(), (X,))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x.topk(2), r"torch.return_types.topk, .*tuple\(x.topk"),
        (lambda x: (x * 2, "text"), "its output 1 is the text 'text'"),
        (lambda x: Pair(x * 2, x), "Pair, for which torch has no name"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_by_name(
    function: Callable[[torch.Tensor], Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=said):
        save_program(exported(function), tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


MODEL = """
import torch
from torch.utils import _pytree as pytree

class Output(dict):
    pass

pytree.register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda values, keys: Output(zip(keys, values)),
    serialized_type_name="a_library.Output",
)

class Net(torch.nn.Module):
    def forward(self, x):
        return Output(hidden=x * 2, more=[x, Output(last=x + 1)])
"""


def test_a_class_that_is_not_known_is_named_and_a_builder_needs_none(tmp_path: Path) -> None:
    """As with the output classes of transformers, which only processes know that have imported it."""
    known: dict[str, Any] = {}
    exec(MODEL, known)
    program = torch.export.export(known["Net"]().eval(), (X,))
    plain = with_plain_containers(program)
    assert output_names(plain) == ["output['hidden']", "output['more'][0]", "output['more'][1]['last']"]
    assert type(program.module()(X)).__name__ == "Output"
    save_program(program, tmp_path / "own.pt2")
    save_program(plain, tmp_path / "plain.pt2")
    code = (
        "import sys, torch; from calibcast.calib.artifacts import load_program\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(sorted(load_program(path).module()(torch.ones(2, 4))))\n"
        "    except Exception as error: print(error)"
    )
    files = [str(tmp_path / name) for name in ("plain.pt2", "own.pt2")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    plainly, own = done.stdout.splitlines()
    assert plainly == "['hidden', 'more']"
    assert "takes or gives a_library.Output, which this process does not know" in own
    assert pytree.tree_leaves(load_program(tmp_path / "own.pt2").module()(X))[0].equal(X * 2)


def test_plain_containers_are_left_alone() -> None:
    program = exported(lambda x: {"a": [x * 2, (x,)]})
    assert with_plain_containers(program) is program
