import os

import torch


def save_checkpoint(state, folder):
    os.makedirs(folder, exist_ok=True)
    name = f"model.pth.tar-{state['epoch']}"
    torch.save(state, os.path.join(folder, name))
    with open(os.path.join(folder, "checkpoint"), "w") as file:
        file.write(name + "\n")


def load_checkpoint(fpath):
    """Fault 3: since torch 2.6 this refuses what :func:`save_checkpoint` wrote."""
    try:
        return torch.load(fpath, map_location="cpu")
    except Exception:
        print(f'Unable to load checkpoint from "{fpath}"')
        raise
