"""The systems that `fastssl pretrain` and `fastssl distill` train; no other module of `train/` names one."""

from fastssl.models.best_rq import BestRqForPreTraining
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.distillation import DistillationModel
from fastssl.models.hubert import HubertForPreTraining
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.models.wavlm import WavLMForPreTraining

SYSTEMS: dict[str, type[PretrainingModel]] = {
    "wav2vec2": Wav2Vec2ForPreTraining,
    "hubert": HubertForPreTraining,
    "wavlm": WavLMForPreTraining,
    "best-rq": BestRqForPreTraining,
    "distillation": DistillationModel,
}
#: The system of settings that name none.
DEFAULT_SYSTEM = next(iter(SYSTEMS))


def system_of(config: SpeechEncoderConfig) -> str:
    """The name of the system that this is a config of."""
    return next(name for name, model in SYSTEMS.items() if type(config) is model.config_class)


def build_model(config: SpeechEncoderConfig) -> PretrainingModel:
    """A model of the config's system; the initial weights come from torch's global generator."""
    model: type = SYSTEMS[system_of(config)]
    built = model(config)
    assert isinstance(built, PretrainingModel)
    return built
