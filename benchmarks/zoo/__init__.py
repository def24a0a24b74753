"""A zoo of architectures: seeded, offline, small, and each unlike the others in more than width and depth."""

from benchmarks.zoo.architecture import CALIBRATION_BATCHES, Architecture, Sample
from benchmarks.zoo.convolutional import CONVOLUTIONAL
from benchmarks.zoo.image_to_image import IMAGE_TO_IMAGE
from benchmarks.zoo.language import LANGUAGE
from benchmarks.zoo.masks import MASKS
from benchmarks.zoo.mixed_types import MIXED_TYPES
from benchmarks.zoo.recommenders import RECOMMENDERS
from benchmarks.zoo.sequences import SEQUENCES
from benchmarks.zoo.structures import STRUCTURES
from benchmarks.zoo.vision_transformers import VISION_TRANSFORMERS
from benchmarks.zoo.writes import WRITES

ZOO: dict[str, Architecture] = {
    entry.name: entry
    for family in (
        CONVOLUTIONAL,
        VISION_TRANSFORMERS,
        IMAGE_TO_IMAGE,
        LANGUAGE,
        SEQUENCES,
        RECOMMENDERS,
        MASKS,
        MIXED_TYPES,
        WRITES,
        STRUCTURES,
    )
    for entry in family
}

__all__ = ["CALIBRATION_BATCHES", "ZOO", "Architecture", "Sample"]
