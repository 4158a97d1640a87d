// Attention in f16: a file of its own, so that a run does not translate the kernels of other types.

#include "attention.cuh"

FORWARD(f16, 40, 128, 64, 4)
FORWARD(f16, 64, 128, 64, 4)
FORWARD(f16, 80, 128, 32, 4)
FORWARD(f16, 160, 64, 32, 4)
DELTA(f16)
BACKWARD_Q(f16, 40, 128, 32, 4)
BACKWARD_Q(f16, 64, 128, 32, 4)
BACKWARD_Q(f16, 80, 64, 32, 4)
BACKWARD_Q(f16, 160, 64, 32, 4)
BACKWARD_KV(f16, 40, 128, 32, 4)
BACKWARD_KV(f16, 64, 64, 64, 4)
BACKWARD_KV(f16, 80, 64, 32, 4)
BACKWARD_KV(f16, 160, 64, 32, 4)
