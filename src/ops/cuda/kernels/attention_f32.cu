// Attention in f32: a file of its own, so that a run does not translate the kernels of other types.

#include "attention.cuh"

FORWARD(f32, 40, 64, 32, 4)
FORWARD(f32, 64, 64, 32, 4)
FORWARD(f32, 80, 64, 32, 4)
FORWARD(f32, 160, 64, 16, 4)
DELTA(f32)
BACKWARD_Q(f32, 40, 64, 32, 4)
BACKWARD_Q(f32, 64, 64, 32, 4)
BACKWARD_Q(f32, 80, 64, 32, 4)
BACKWARD_Q(f32, 160, 32, 16, 2)
BACKWARD_KV(f32, 40, 64, 32, 4)
BACKWARD_KV(f32, 64, 64, 32, 4)
BACKWARD_KV(f32, 80, 64, 32, 4)
BACKWARD_KV(f32, 160, 32, 16, 2)
