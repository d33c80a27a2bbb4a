// All kernels, compiled once per instruction set: setup.py sets the flags of each, and renames every ent_x to
// ent_x_<isa>. Reading order is the order of inclusion.
#include <stdint.h>

#include "kernels.h"

#include "parallel.h"
#include "simd.h"
#include "simd_int16.h"

#include "packed.c.inc"
#include "matmul_tile.c.inc"
#include "matmul.c.inc"
#include "matmul_bfloat16.c.inc"
#include "packed_fixed.c.inc"
#include "packed_few.c.inc"

// ---- row kernels: softmax, norms, rope, swiglu, loss, embedding, optimizer ----
#include "rows.c.inc"
#include "norm.c.inc"
#include "rope.c.inc"
#include "swiglu.c.inc"
#include "loss.c.inc"
#include "embedding.c.inc"
#include "optimizer.c.inc"

// ---- attention, the fused loss, feed-forward: they use the kernels above ----
#include "attention_block.c.inc"
#include "attention_few.c.inc"
#include "attention.c.inc"
#include "linear_cross_entropy.c.inc"
#include "packed_mlp.c.inc"

#include "peak.c.inc"
#include "quantize.c.inc"
