"""Write a checkpoint whose settings are objects of the omegaconf that is installed, as fairseq writes them.

Run by tests in a process of its own: the classes of fairseq's settings must not be there when the file is read.

    python write_fairseq.py FILE

FILE has a dictionary with `weights`, `model`, `task` and `nested`, and is replaced.
"""

import enum
import sys
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035 - as fairseq names them

import omegaconf
import torch
from omegaconf import OmegaConf

PLACE = "fairseq.models.wav2vec.wav2vec2"


def into_fairseq(made: Any) -> Any:
    """Let a class claim to be one of fairseq's, which pickle checks when it writes."""
    made.__module__, made.__qualname__ = PLACE, made.__name__
    setattr(sys.modules[PLACE], made.__name__, made)
    return made


def resolve(value: str) -> str:
    """Resolve `${twice:x}`; omegaconf stores what a resolver returned in its metadata."""
    return value * 2


def main(path: str) -> None:
    """Write the file, and print the version of omegaconf."""
    for name in ("fairseq", "fairseq.models", "fairseq.models.wav2vec", PLACE):
        sys.modules[name] = ModuleType(name)
    wanted = torch.load(path)
    choices = into_fairseq(enum.Enum("Choices", {"default": "default", "layer_norm": "layer_norm"}))
    settings = {name: value for name, value in wanted["model"].items() if name != "extractor_mode"}
    fields = [(name, type(value), field(default=value)) for name, value in settings.items()]
    typed = [
        ("extractor_mode", choices, field(default=choices[wanted["model"]["extractor_mode"]])),
        ("latent_temp", Tuple[float, float, float], field(default=(2, 0.5, 0.999995))),  # noqa: UP006
        ("names", List[str], field(default_factory=lambda: ["a"])),  # noqa: UP006
        ("table", Dict[str, int], field(default_factory=lambda: {"a": 1})),  # noqa: UP006
        ("missing", Optional[str], field(default=None)),  # noqa: UP045
        ("normalize", bool, field(default=omegaconf.II("task.normalize"))),
        ("again", str, field(default="${twice:x}")),
        ("w2v_args", Any, field(default=None)),
    ]
    model = into_fairseq(make_dataclass("Wav2Vec2Config", [*fields, *typed]))

    @dataclass
    class Task:
        normalize: bool = wanted["task"]["normalize"]

    task = into_fairseq(Task)
    config = make_dataclass(
        "FairseqConfig",
        [("model", model, field(default_factory=model)), ("task", task, field(default_factory=task))],
    )
    cfg = OmegaConf.structured(into_fairseq(config))
    if hasattr(OmegaConf, "register_new_resolver"):
        OmegaConf.register_new_resolver("twice", resolve, use_cache=True)
    else:
        OmegaConf.register_resolver("twice", resolve)
    assert cfg.model.again == "xx"
    if wanted["nested"]:
        # fairseq turns the outer settings of a fine-tuned model into a dictionary.
        outer = {"_name": "wav2vec_ctc", "normalize": wanted["task"]["normalize"], "w2v_args": cfg}
        cfg = {"model": outer, "task": {"normalize": wanted["task"]["normalize"]}}
    torch.save({"args": None, "cfg": cfg, "model": wanted["weights"]}, path)
    print(omegaconf.__version__)


if __name__ == "__main__":
    main(sys.argv[1])
