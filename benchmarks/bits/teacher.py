"""Write a teacher with random weights for the distillation runs: `python -m benchmarks.bits.teacher FOLDER`."""

import sys

import torch

import fastssl
from benchmarks.bits.encoders import disturb


def main() -> None:
    torch.manual_seed(0)
    config = fastssl.EncoderConfig(
        model_type="hubert",
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=768,
        conv_dim=(128,) * 7,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
    )
    encoder = fastssl.Encoder(config)
    disturb(encoder)
    encoder.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
