"""Run PyTorch code on a pretended GPU, to see what the host does: launches, waits, devices and dtypes.

CUDA tensors are fake: they have shape, dtype and device, but no memory. CPU tensors are real. The host code of every
operator and of every Triton launch runs for real; no kernel runs. See `mode.py` for what is recorded.

    python -m tests.emulation.fake_cuda.run "train/wav2vec2/*"     # prints a table
    python -m tests.emulation.fake_cuda.run --record               # rewrites tests/emulation/budgets.json
"""
