"""Real data that is installed anyway or lies in packages: speech, photographs, faces, text, digits, weather, files."""

from __future__ import annotations

import csv
import sysconfig
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.trained.subject import folder_of

RATE = 16000


def speech() -> torch.Tensor:
    """Ten seconds of a man who reads, at 16 kHz, within 1; `useful-moonshine-onnx` ships them."""
    from scipy.io import wavfile

    rate, samples = wavfile.read(folder_of("moonshine_onnx") / "assets" / "beckett.wav")
    assert rate == RATE
    return torch.from_numpy(samples.copy()).float() / 32768


def frames(sound: torch.Tensor, size: int, step: int, batch: int) -> list[torch.Tensor]:
    """Windows of a sound, [batch, size] each."""
    found = sound.unfold(0, size, step).contiguous()
    return [found[i : i + batch] for i in range(0, len(found) - batch + 1, batch)]


def photographs() -> list[torch.Tensor]:
    """The two of scikit-learn, [3, height, width], within 1: a temple, a flower."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]


def patches(image: torch.Tensor, size: int, count: int, seed: int) -> torch.Tensor:
    """Squares at random places, [count, channels, size, size]."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, image.shape[1] - size, (count,), generator=draw).tolist()
    columns = torch.randint(0, image.shape[2] - size, (count,), generator=draw).tolist()
    return torch.stack([image[:, r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)])


def faces() -> tuple[torch.Tensor, torch.Tensor]:
    """200 of 25 x 25 pixels, [200, 1, 25, 25] within 1, and which are faces: the first 100; scikit-image ships them."""
    import numpy as np

    images = torch.from_numpy(np.load(folder_of("skimage") / "data" / "lfw_subset.npy")).float()[:, None]
    return images / max(1.0, float(images.max())), torch.arange(len(images)) < 100


def text() -> str:
    """Python's own manual of its language, as `help()` shows it: 700,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def characters() -> torch.Tensor:
    """That text as numbers, [length] int64, 0 to 95: printable ASCII, and 95 for all else."""
    codes = torch.tensor([ord(c) for c in text()])
    return torch.where((codes >= 32) & (codes < 127), codes - 32, 95)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 handwritten digits, [N, 1, 8, 8] within 1, and what they are, in a fixed random order."""
    import datasets
    from calibcast.engines.demo import DATA

    rows = datasets.Dataset.from_parquet(str(DATA)).with_format("torch")[:]
    order = torch.randperm(len(rows["label"]), generator=torch.Generator().manual_seed(0))
    return rows["pixels"].float().view(-1, 1, 8, 8)[order] / 16, rows["label"].long()[order]


def weather() -> torch.Tensor:
    """A year of San Francisco by the hour, [8759, 2] float64: seconds since 1970, and degrees Fahrenheit."""
    with (folder_of("vega_datasets") / "_data" / "sf-temps.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    times = [datetime.strptime(row["date"], "%Y/%m/%d %H:%M:%S").replace(tzinfo=UTC).timestamp() for row in rows]
    return torch.tensor([times, [float(row["temp"]) for row in rows]], dtype=torch.float64).T


def labelled_files(each: int) -> list[tuple[Path, str]]:
    """Files of this Python and its packages with what they are, `each` of a kind, in turn."""
    library = Path(sysconfig.get_paths()["stdlib"])
    places = {
        "python": (library, "*.py"),
        "c": (Path(sysconfig.get_paths()["include"]), "*.h"),
        "csv": (folder_of("vega_datasets") / "_data", "*.csv"),
        "json": (folder_of("vega_datasets") / "_data", "*.json"),
        "png": (folder_of("skimage") / "data", "*.png"),
        "rst": (folder_of("sklearn") / "datasets" / "descr", "*.rst"),
    }
    found = {kind: sorted(folder.glob(pattern))[:each] for kind, (folder, pattern) in places.items()}
    return [(paths[i], kind) for i in range(each) for kind, paths in found.items() if i < len(paths)]
