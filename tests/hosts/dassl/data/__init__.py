from dassl.utils import Registry

DATASET_REGISTRY = Registry("DATASET")


class Datum:
    def __init__(self, impath, label, classname):
        self.impath, self.label, self.classname = impath, label, classname


def build_dataset(cfg):
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
