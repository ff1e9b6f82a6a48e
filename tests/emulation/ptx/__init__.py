"""Run compiled Triton kernels without a GPU: their PTX is executed in NumPy, with one lane of an array per thread.

The kernels are compiled for sm_80, so what runs is Triton's real output: layouts, vector loads, `cp.async`, `ldmatrix`,
`mma.sync`, shuffles, predicates, barriers. Every access is checked: it must be inside the tensor whose pointer it was
computed from, it must be aligned, and shared memory must have been written before it is read, by the same warp or
before a barrier.

- `parser.py` turns PTX text into instructions.
- `values.py` converts between bits and numbers.
- `memory.py` has global and shared memory, with their checks.
- `lanes.py` has the registers of all threads.
- `arithmetic.py`, `movement.py`, `warps.py` and `tensor_cores.py` say what each instruction does.
- `machine.py` runs a kernel: branches, divergence and barriers.
- `launch.py` replaces Triton's launcher.
- `subjects.py` has a batch of each op, and `checks.py` what is checked of it; `__main__.py` runs them, in a process
  without Triton's interpreter. `plugin.py` runs the tests of the ops.
- `faults.py` puts faults into kernels, and `far.py` gives them tensors of more than 2^31 elements.

What it does not show: the hardware's approximations (`ex2.approx` is as exact as NumPy), instructions of later
architectures (`wgmma`, `tcgen05`), and time.
"""
