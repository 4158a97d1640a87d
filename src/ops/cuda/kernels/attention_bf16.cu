// Attention in bf16: a file of its own, so that a run does not translate the kernels of other types.

#include "attention.cuh"

FORWARD(bf16, 40, 128, 64, 4)
FORWARD(bf16, 64, 128, 64, 4)
FORWARD(bf16, 80, 128, 32, 4)
FORWARD(bf16, 160, 64, 32, 4)
DELTA(bf16)
BACKWARD_Q(bf16, 40, 128, 32, 4)
BACKWARD_Q(bf16, 64, 128, 32, 4)
BACKWARD_Q(bf16, 80, 64, 32, 4)
BACKWARD_Q(bf16, 160, 64, 32, 4)
BACKWARD_KV(bf16, 40, 128, 32, 4)
BACKWARD_KV(bf16, 64, 64, 64, 4)
BACKWARD_KV(bf16, 80, 64, 32, 4)
BACKWARD_KV(bf16, 160, 64, 32, 4)
