"""Convolutions and linear layers for inference, with weights laid out beforehand in fp32, bf16 or int8."""
