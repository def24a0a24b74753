"""Speech, recurrent networks and time series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.architecture import Architecture, Sample, settled
from benchmarks.zoo.language import PAIRED, WORDS, model

BATCH = Dim("batch", min=1, max=64)
AUDIO: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "num_feat_extract_layers": 3,
}  # fmt: skip


class Tagger(nn.Module):
    """A bidirectional LSTM over word vectors, and a label for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.lstm = nn.LSTM(16, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.labels = nn.Linear(24, 7)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: [batch, length]. Log probabilities [batch, length, 7], and the last states."""
        hidden, (last, _) = self.lstm(self.words(ids))
        return F.log_softmax(self.labels(hidden), -1), last


class AttentiveGru(nn.Module):
    """A GRU whose states are pooled with learned attention; packed lengths as a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 16, batch_first=True)
        self.score, self.head = nn.Linear(16, 1), nn.Linear(16, 4)

    def forward(self, signal: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """signal: [batch, length, 6]; lengths: [batch]."""
        hidden, _ = self.gru(signal)
        beyond = torch.arange(signal.shape[1])[None, :] >= lengths[:, None]
        weights = self.score(hidden)[..., 0].masked_fill(beyond, float("-inf")).softmax(-1)
        return {"logits": self.head((weights[..., None] * hidden).sum(1)), "weights": weights}


class Forecaster(nn.Module):
    """LSTM cells unrolled by hand, feeding back what they predict."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(3, 16), nn.Linear(16, 3)

    def forward(self, past: torch.Tensor) -> torch.Tensor:
        """past: [batch, 6, 3] to [batch, 4, 3]."""
        hidden, state = past.new_zeros(past.shape[0], 16), past.new_zeros(past.shape[0], 16)
        for step in past.unbind(1):
            hidden, state = self.cell(step, (hidden, state))
        found = []
        for _ in range(4):
            found.append(self.out(hidden))
            hidden, state = self.cell(found[-1], (hidden, state))
        return torch.stack(found, 1)


class TemporalConvolution(nn.Module):
    """Dilated causal convolutions with weight norm, gates and skips, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.first = nn.Conv1d(2, 16, 1)
        self.gates = nn.ModuleList(norm(nn.Conv1d(16, 32, 2, dilation=2**i)) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.norm, self.last = nn.BatchNorm1d(16), nn.Conv1d(16, 2, 1)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """wave: [batch, 2, length]."""
        x = self.first(wave)
        total = torch.zeros_like(x)
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            filtered, opened = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = skip(torch.tanh(filtered) * torch.sigmoid(opened))
            x, total = x + y, total + y
        return self.last(F.relu(self.norm(total)))


def _words(index: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (2 + index % 2, 12))


def _signals(index: int) -> dict[str, torch.Tensor]:
    return {"signal": torch.randn(3, 12, 6), "lengths": torch.tensor([12, 10 - index, 3])}


def _sample(make: Callable[[], nn.Module], batch: Callable[[int], torch.Tensor]) -> Callable[[], Sample]:
    return lambda: Sample(make().eval(), (batch(0),), dynamic_shapes=({0: BATCH},))


def _past(index: int) -> torch.Tensor:
    return torch.randn(3, 6, 3).cumsum(1)


def _wave(index: int) -> torch.Tensor:
    """[batch, 2, length]: a tone and noise."""
    time = torch.arange(40.0) / 40
    return torch.stack([torch.sin((20 + index) * time), torch.randn(40) * 0.3])[None].repeat(2, 1, 1)


def _temporal() -> Sample:
    return Sample(settled(TemporalConvolution(), torch.cat([_wave(i) for i in range(4)])), (_wave(0),))


def _audio(index: int) -> dict[str, torch.Tensor]:
    """[batch, samples]: raw audio; the positional convolution has the export fix its length."""
    return {"input_values": torch.randn(2, 400)}


def _spectrograms(index: int) -> dict[str, torch.Tensor]:
    """Log-mel frames for the encoder, text so far for the decoder."""
    return {
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": torch.randint(3, WORDS, (2, (6, 4, 6, 5)[index % 4])),
    }


def _whisper() -> Sample:
    make = model(
        "WhisperForConditionalGeneration", "sdpa", **{k: v for k, v in PAIRED.items() if k[:3] != "max"},
        num_mel_bins=8, max_source_positions=20, max_target_positions=32,
    )  # fmt: skip
    shapes = {"input_features": {0: BATCH}, "decoder_input_ids": {0: BATCH, 1: Dim("length", min=2, max=32)}}
    return Sample(make(), (), _spectrograms(0), shapes)


def _wav2vec2() -> Sample:
    return Sample(model("Wav2Vec2ForCTC", **AUDIO)(), (), _audio(0), {"input_values": {0: BATCH}})


def _patch_tst() -> Sample:
    make = model(
        "PatchTSTForPrediction", num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=16,
        num_attention_heads=4, num_hidden_layers=2, ffn_dim=32, prediction_length=8, norm_type="layernorm",
    )  # fmt: skip
    return Sample(make(), (), _series(0))


def _series(index: int) -> dict[str, torch.Tensor]:
    return {"past_values": torch.randn(2, 32, 3).cumsum(1) + 10 * index}


def _attentive() -> Sample:
    shapes = {"signal": {0: BATCH}, "lengths": {0: BATCH}}
    return Sample(AttentiveGru().eval(), (), _signals(0), shapes)


SEQUENCES = (
    Architecture(
        "whisper", "speech", _whisper, _spectrograms,
        covers=("speech", "encoder-decoder transformer", "token ids", "two sequence lengths", "dynamic batch",
                "keyword inputs", "dataclass outputs", "shared parameters"),
    ),
    Architecture(
        "wav2vec2", "speech", _wav2vec2, _audio, covers=("speech", "keyword inputs", "dataclass outputs"),
    ),
    Architecture("patch_tst", "time series", _patch_tst, _series, covers=("multi-output op",)),
    Architecture(
        "lstm_tagger", "recurrent", _sample(Tagger, _words), _words,
        covers=("LSTM", "token ids", "dynamic batch", "multi-output op"),
    ),
    Architecture(
        "attentive_gru", "recurrent", _attentive, _signals,
        covers=("GRU", "-inf mask", "dict outputs", "factory function", "keyword inputs", "dynamic batch"),
    ),
    Architecture(
        "lstm_cells", "recurrent",
        lambda: Sample(Forecaster().eval(), (_past(0),), dynamic_shapes=({0: BATCH},)), _past,
        covers=("LSTM", "multi-output op", "factory function", "dynamic batch"),
    ),
    Architecture("wavenet", "time series", _temporal, _wave, covers=("multi-output op",)),
)  # fmt: skip
