"""The contrastive loss of wav2vec 2.0, with which frames were told apart from their negatives."""

from fastssl.ops.contrastive_loss.op import contrastive_loss as contrastive_loss
