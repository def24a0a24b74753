"""A zoo of architectures: seeded, offline, small, and each unlike the others in more than width and depth."""

from benchmarks.zoo.architecture import CALIBRATION_BATCHES, Architecture, Sample
from benchmarks.zoo.convolutional import CONVOLUTIONAL
from benchmarks.zoo.features import FEATURES
from benchmarks.zoo.image_to_image import IMAGE_TO_IMAGE
from benchmarks.zoo.language import LANGUAGE
from benchmarks.zoo.recommenders import RECOMMENDERS
from benchmarks.zoo.sequences import SEQUENCES
from benchmarks.zoo.vision_transformers import VISION_TRANSFORMERS

ZOO: dict[str, Architecture] = {
    entry.name: entry
    for family in (
        CONVOLUTIONAL,
        VISION_TRANSFORMERS,
        IMAGE_TO_IMAGE,
        LANGUAGE,
        SEQUENCES,
        RECOMMENDERS,
        FEATURES,
    )
    for entry in family
}

__all__ = ["CALIBRATION_BATCHES", "ZOO", "Architecture", "Sample"]
