"""Modules over packed sequences: front ends, attention, positions, compression, quantisers and the contrastive loss.

Each module can be used on its own, in a model that is not part of this package.
"""

from fastssl.nn.attention import SelfAttention as SelfAttention
from fastssl.nn.compression import Compressed as Compressed
from fastssl.nn.compression import SequenceCompressor as SequenceCompressor
from fastssl.nn.conformer import ConformerLayer as ConformerLayer
from fastssl.nn.contrastive import ContrastiveLoss as ContrastiveLoss
from fastssl.nn.feature_extractor import FeatureExtractor as FeatureExtractor
from fastssl.nn.linear import with_plain_linears as with_plain_linears
from fastssl.nn.log_mel import LogMel as LogMel
from fastssl.nn.random_projection import RandomProjectionQuantizer as RandomProjectionQuantizer
from fastssl.nn.rates import AdaptiveRate as AdaptiveRate
from fastssl.nn.transformer import ConvolutionalPositionalEmbedding as ConvolutionalPositionalEmbedding
