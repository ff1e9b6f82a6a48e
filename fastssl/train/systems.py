"""The systems that `fastssl pretrain` and `distill` train: the settings of each, and the model that they make."""

from typing import NamedTuple

from fastssl.models.best_rq import BestRqConfig, BestRqForPreTraining
from fastssl.models.distillation import DistillationConfig, DistillationModel
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining

ModelConfig = Wav2Vec2Config | HubertConfig | BestRqConfig | DistillationConfig
Model = Wav2Vec2ForPreTraining | HubertForPreTraining | BestRqForPreTraining | DistillationModel


class System(NamedTuple):
    """A system and what it needs."""

    title: str
    config: type[ModelConfig]
    #: Whether it predicts the labels that `fastssl label` makes.
    labels: bool = False
    #: The command that trains it.
    command: str = "pretrain"


SYSTEMS = {
    "wav2vec2": System("wav2vec 2.0", Wav2Vec2Config),
    "hubert": System("HuBERT", HubertConfig, labels=True),
    "best-rq": System("BEST-RQ", BestRqConfig),
    "distillation": System("distillation", DistillationConfig, command="distill"),
}


def system_of(config: ModelConfig) -> str:
    """The name of the system that has such settings."""
    return next(name for name, system in SYSTEMS.items() if type(config) is system.config)


def build_model(config: ModelConfig) -> Model:
    """A model with fresh weights, from torch's generator."""
    if isinstance(config, HubertConfig):
        return HubertForPreTraining(config)
    if isinstance(config, DistillationConfig):
        return DistillationModel(config)
    if isinstance(config, BestRqConfig):
        return BestRqForPreTraining(config)
    return Wav2Vec2ForPreTraining(config)
