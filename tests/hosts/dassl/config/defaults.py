from yacs.config import CfgNode as CN

_C = CN(
    {
        "OUTPUT_DIR": "",
        "RESUME": "",
        "SEED": -1,
        "USE_CUDA": True,
        "VERBOSE": True,
        "DATASET": {"ROOT": "", "NAME": "", "NUM_SHOTS": -1, "ALL_AS_UNLABELED": False},
        "INPUT": {
            "SIZE": (32, 32),
            "INTERPOLATION": "bicubic",
            "TRANSFORMS": ("random_flip", "normalize"),
            "PIXEL_MEAN": [0.5, 0.5, 0.5],
            "PIXEL_STD": [0.5, 0.5, 0.5],
        },
        "DATALOADER": {"NUM_WORKERS": 0, "TRAIN_X": {"BATCH_SIZE": 3, "N_INS": 16}, "TEST": {"BATCH_SIZE": 4}},
        "MODEL": {"INIT_WEIGHTS": "", "BACKBONE": {"NAME": "", "PRETRAINED": True}},
        "OPTIM": {
            "NAME": "sgd",
            "LR": 0.05,
            "MAX_EPOCH": 3,
            "LR_SCHEDULER": "cosine",
            "WARMUP_EPOCH": 1,
            "WARMUP_CONS_LR": 1e-5,
        },
        "TRAIN": {"CHECKPOINT_FREQ": 1, "PRINT_FREQ": 1},
        "TEST": {"NO_TEST": False, "SPLIT": "test", "FINAL_MODEL": "last_step"},
        "TRAINER": {"NAME": ""},
    }
)
