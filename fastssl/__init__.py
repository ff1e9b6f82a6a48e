"""Self-supervised speech encoders that never compute padding.

Start with `load_encoder` to run a pretrained encoder, or `accelerate` to speed up a Transformers or torchaudio model
(`validate` compares it with the original).
`fastssl.nn` contains the modules and `fastssl.ops` the kernels that they call.
"""

from fastssl import nn as nn
from fastssl import ops as ops
from fastssl.interop import ValidationError as ValidationError
from fastssl.interop import ValidationReport as ValidationReport
from fastssl.interop import accelerate as accelerate
from fastssl.interop import load_encoder as load_encoder
from fastssl.interop import register_attention as register_attention
from fastssl.interop import restore as restore
from fastssl.interop import validate as validate
from fastssl.models.conformer import ConformerConfig as ConformerConfig
from fastssl.models.conformer import ConformerEncoder as ConformerEncoder
from fastssl.models.encoder import Encoder as Encoder
from fastssl.models.encoder import EncoderConfig as EncoderConfig
from fastssl.models.model_card import ModelCard as ModelCard
from fastssl.models.speech_encoder import EncoderOutput as EncoderOutput
from fastssl.models.speech_encoder import SpeechEncoder as SpeechEncoder
from fastssl.packing import Layout as Layout
from fastssl.packing import Packed as Packed

__version__ = "0.1.0"
