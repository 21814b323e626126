"""Operations that exist twice: in torch, on any device and dtype, and as Triton kernels, for half types on CUDA.

``choice`` says which of them a run takes, and why. Only the files ``triton_*.py`` import Triton, and they are imported
when a kernel is first called. Both forms of an operation have one interface.

A kernel computes in float32, whatever it reads, and rounds what it writes once. ``TRITON_INTERPRET=1``, set before the
first call, runs the same source on a CPU: with float32 (the interpreter's ``tl.dot`` of bfloat16 is wrong without a
word, which is why the kernels that have products can widen their inputs first). None of them has run on a GPU yet.
"""
