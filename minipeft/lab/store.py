"""Write what a method learned, and the task's new head with it, into one safetensors file; read it back."""

import pathlib

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .models import head


def save(path, model, method) -> int:
    """`method.state(model)` and the head, if the model has one; returns the bytes written."""
    tensors = {f"method.{k}": v.detach().cpu().contiguous() for k, v in method.state(model).items()}
    tensors |= {f"head.{n}": model.get_parameter(n).detach().cpu().clone() for n in head(model)}
    save_file(tensors, path, metadata={"method": method.__name__.rpartition(".")[2]})
    return pathlib.Path(path).stat().st_size


def load(path, model, method) -> None:
    """Inverse of `save` on a model with the same sites and head; all of the file or nothing."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"no saved method at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    heads = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
    if odd := sorted(heads.keys() ^ set(head(model))):
        raise KeyError(f"head tensors only in one of model and file: {odd}")
    for name, v in heads.items():
        if v.shape != model.get_parameter(name).shape:
            raise ValueError(f"{name} has shape {tuple(v.shape)}, expected {tuple(model.get_parameter(name).shape)}")
    method.load(model, {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")})
    for name, v in heads.items():
        model.get_parameter(name).data.copy_(v)
