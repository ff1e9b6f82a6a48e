"""The contrastive loss of wav2vec 2.0, with which frames were told apart from their negatives."""
