"""Other people's models: run by our kernels, and read from their checkpoints."""

from fastssl.interop.accelerate import accelerate as accelerate
from fastssl.interop.accelerate import restore as restore
from fastssl.interop.attention import register_attention as register_attention
from fastssl.interop.load import load_encoder as load_encoder
