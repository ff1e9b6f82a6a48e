"""List the systems that `fastssl pretrain` and `fastssl distill` can train. No other module of `train/` names them."""

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
#: System to use for settings that do not name one.
DEFAULT_SYSTEM = next(iter(SYSTEMS))


def system_of(config: SpeechEncoderConfig) -> str:
    """Return the name of the system that a config belongs to.

    Args:
        config: An instance of a system's `config_class`.
    """
    return next(name for name, model in SYSTEMS.items() if type(config) is model.config_class)


def build_model(config: SpeechEncoderConfig) -> PretrainingModel:
    """Make a model of the system that a config belongs to, with random weights from PyTorch's global generator.

    Args:
        config: An instance of a system's `config_class`.
    """
    model: type = SYSTEMS[system_of(config)]
    built = model(config)
    assert isinstance(built, PretrainingModel)
    return built
