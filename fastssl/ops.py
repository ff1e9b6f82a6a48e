"""Functions over packed tensors. Each op has a folder in `fastssl.kernels` with a reference, kernels and a README.

Shapes use the same letters everywhere: N packed rows (frames) of a batch, B sequences, C or D channels, H heads.

Every op takes `backend`, one of:
    "reference": plain PyTorch, which specifies the result.
    "native": compiled C++ or CUDA.
    "triton": Triton kernels.
    "torch": the kernel that PyTorch itself provides for the operation.
    None: the value of the environment variable FASTSSL_BACKEND if it is set, otherwise the fastest available backend.
        Under transforms of `torch.func` and forward-mode AD, only the reference is available.
`fastssl info` lists the backends that are available on this machine. The environment variable FASTSSL_EXCLUDE leaves
some out, as in FASTSSL_EXCLUDE=varlen_attention.triton,strided_conv.native; `fastssl check` names those that fail here.
"""

from fastssl.kernels import dispatch
from fastssl.kernels.bias_gelu_dropout.op import bias_gelu_dropout as bias_gelu_dropout
from fastssl.kernels.contrastive_loss.op import contrastive_loss as contrastive_loss
from fastssl.kernels.dropout_add_layer_norm.op import dropout_add_layer_norm as dropout_add_layer_norm
from fastssl.kernels.gumbel_quantize.op import gumbel_quantize as gumbel_quantize
from fastssl.kernels.integrate_and_fire.op import integrate_and_fire as integrate_and_fire
from fastssl.kernels.positional_conv.op import positional_conv as positional_conv
from fastssl.kernels.prepacked_conv.front_end import PrepackedConvLayer as PrepackedConvLayer
from fastssl.kernels.prepacked_conv.front_end import prepacked_front_end as prepacked_front_end
from fastssl.kernels.prepacked_conv.op import RowNorm as RowNorm
from fastssl.kernels.prepacked_conv.op import prepacked_conv as prepacked_conv
from fastssl.kernels.prepacked_conv.op import prepacked_linear as prepacked_linear
from fastssl.kernels.prepacked_conv.weights import PrepackedWeight as PrepackedWeight
from fastssl.kernels.prepacked_conv.weights import prepack as prepack
from fastssl.kernels.prepacked_conv.weights import unpack as unpack
from fastssl.kernels.strided_conv.op import strided_conv as strided_conv
from fastssl.kernels.strided_conv.op import strided_conv_stack as strided_conv_stack
from fastssl.kernels.strided_conv.plan import StridedConvLayer as StridedConvLayer
from fastssl.kernels.varlen_attention.op import varlen_attention as varlen_attention

dispatch.check_excluded()
