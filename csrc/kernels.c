// All kernels, compiled once per instruction set: setup.py sets the flags of each, and renames every ent_x to
// ent_x_<isa>. Reading order is the order of inclusion.
#include <stdint.h>

#include "kernels.h"

#include "parallel.h"
#include "simd.h"

#include "matmul.c.inc"

// ---- row kernels: softmax, norms, rope, swiglu, loss, embedding, optimizer ----

// ---- attention and the fused loss: they use the kernels above ----

#include "peak.c.inc"
