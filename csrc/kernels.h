// Every kernel, as a contract: the formula, the shapes, what may alias. Outputs come first, inputs are const, sizes
// last. Kernels trust their callers (entrenar/kernels/native.py checks), never allocate, print or exit; `scratch` is
// the caller's, its size in floats is given here.
//
// This file holds comments and prototypes only, one type per parameter: csrc/build_kernels.py reads it to make the
// table of function pointers per instruction set, and cffi reads it to make the Python module. Adding a kernel is one
// prototype here, its code in a .c.inc, and a wrapper in native.py.
//
// B batch, T time, S key/value length, C channels, H heads, KH key/value heads, D head dim, V vocabulary, N rows

// ---- matmul.c.inc ------------------------------------------------------------------------------------------------

// c[g,m,n] = sum_k a[g,m,k] b[g,k,n]      a (G, M, K), b (G, K, N) by element strides, c (G, M, N) contiguous
// One of a's last two strides is 1, and one of b's; a group stride of 0 broadcasts. `scratch` holds
// ent_matmul_scratch(threads) floats, 64-byte aligned.
void ent_matmul(float *restrict c, const float *a, const float *b, float *restrict scratch, int64_t groups, int64_t m,
                int64_t n, int64_t k, int64_t a_group, int64_t a_row, int64_t a_col, int64_t b_group, int64_t b_row,
                int64_t b_col);
int64_t ent_matmul_scratch(int64_t threads);

// ---- rows.c.inc, norm.c.inc, rope.c.inc, swiglu.c.inc, loss.c.inc, embedding.c.inc, optimizer.c.inc ---------------

// ---- attention.c.inc, linear_cross_entropy.c.inc -----------------------------------------------------------------

// ---- peak.c.inc --------------------------------------------------------------------------------------------------

// Runs `rounds` of register-only fused multiply-adds on every thread; returns how many floating-point operations one
// thread did. sink (threads) receives a value per thread so that nothing is optimised away.
double ent_fma_peak(float *sink, int64_t rounds);
