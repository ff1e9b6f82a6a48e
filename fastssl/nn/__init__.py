"""Modules over packed sequences, each usable alone: front end, attention, positions, compression, contrastive loss."""

from fastssl.nn.attention import SelfAttention as SelfAttention
from fastssl.nn.compression import Compressed as Compressed
from fastssl.nn.compression import SequenceCompressor as SequenceCompressor
from fastssl.nn.contrastive import ContrastiveLoss as ContrastiveLoss
from fastssl.nn.feature_extractor import FeatureExtractor as FeatureExtractor
from fastssl.nn.transformer import ConvolutionalPositionalEmbedding as ConvolutionalPositionalEmbedding
