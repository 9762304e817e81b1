from .torchtools import load_checkpoint, save_checkpoint

__all__ = ["Registry", "load_checkpoint", "save_checkpoint"]


class Registry:
    def __init__(self, name):
        self._name, self._obj_map = name, {}

    def register(self):
        def decorate(obj):
            self._obj_map[obj.__name__] = obj
            return obj

        return decorate

    def get(self, name):
        if name not in self._obj_map:
            raise KeyError(f'Object name "{name}" does not exist in "{self._name}" registry')
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)
