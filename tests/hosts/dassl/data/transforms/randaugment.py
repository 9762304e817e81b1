import numpy as np


def SolarizeAdd(img, addition=0):
    return np.clip(np.array(img).astype(np.int) + addition, 0, 255)
