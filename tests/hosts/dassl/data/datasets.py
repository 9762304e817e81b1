from . import DATASET_REGISTRY, Datum, build_dataset

__all__ = ["DATASET_REGISTRY", "Datum", "build_dataset"]
