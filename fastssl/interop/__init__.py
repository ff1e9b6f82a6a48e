"""Other libraries' models: accelerated by fastssl's kernels, or loaded from their checkpoints."""

from fastssl.interop.attention import register_attention as register_attention
from fastssl.interop.in_place import accelerate as accelerate
from fastssl.interop.in_place import restore as restore
from fastssl.interop.load import load_encoder as load_encoder
from fastssl.interop.validation import validate as validate
from fastssl.interop.validation_report import ValidationError as ValidationError
from fastssl.interop.validation_report import ValidationReport as ValidationReport
