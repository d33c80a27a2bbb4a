// c = a @ b four times, each rung faster than the one before: the ladder of docs/kernels.md. What csrc/matmul.c.inc
// adds to the last rung is other shapes, transposed operands, edges and threads; here all matrices are n x n and
// contiguous, n is a multiple of 96, and there is one thread.
//
//     c (n, n) = a (n, n) @ b (n, n)

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// ---- rung 1: naive --------------------------------------------------------------------------------------------------

// The formula. b is read down a column: every number comes from another cache line.
void rung_naive(float *restrict c, const float *restrict a, const float *restrict b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t k = 0; k < n; k++) sum += a[i * n + k] * b[k * n + j];
            c[i * n + j] = sum;
        }
}

// ---- rung 2: blocked ------------------------------------------------------------------------------------------------

enum { BLOCK = 48 };  // three blocks of 48 x 48 floats are 27 KB: they fit into a first-level cache of 32

// Block by block, so that numbers in the cache are used 48 times before they leave it; and along rows, so that whole
// cache lines are used. (run.py keeps compilers from vectorising by themselves: that is the next
// rung's lesson.)
void rung_blocked(float *restrict c, const float *restrict a, const float *restrict b, int64_t n) {
    memset(c, 0, n * n * sizeof *c);
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK)
        for (int64_t k0 = 0; k0 < n; k0 += BLOCK)
            for (int64_t j0 = 0; j0 < n; j0 += BLOCK)
                for (int64_t i = i0; i < i0 + BLOCK; i++)
                    for (int64_t k = k0; k < k0 + BLOCK; k++) {
                        float a_ik = a[i * n + k];
                        for (int64_t j = j0; j < j0 + BLOCK; j++) c[i * n + j] += a_ik * b[k * n + j];
                    }
}

// ---- rung 3: vectorised ---------------------------------------------------------------------------------------------

enum { W = 8, MR = 6, NR = 2 * W };
typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
static inline vf load(const float *p) { return *(const vf_in_memory *)p; }
static inline void store(float *p, vf v) { *(vf_in_memory *)p = v; }
#define UNROLL _Pragma("GCC unroll 6")

// A tile of 6 x 16 sums lives in 12 vector registers while k runs: two loads and six broadcasts feed 96
// multiply-adds, and c is touched once. Loops over MR and 2 are unrolled, or the sums would live in memory.
static inline __attribute__((always_inline)) void tile(float *c, int64_t ldc, const float *a, int64_t a_row,
                                                       int64_t a_col, const float *b, int64_t b_row, int64_t k,
                                                       int accumulate) {
    vf sum[MR][2];
    UNROLL for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vf){0};
    for (int64_t l = 0; l < k; l++) {
        vf b0 = load(b + l * b_row), b1 = load(b + l * b_row + W);
        UNROLL for (int i = 0; i < MR; i++) {
            float a_il = a[i * a_row + l * a_col];
            sum[i][0] += a_il * b0;
            sum[i][1] += a_il * b1;
        }
    }
    UNROLL for (int i = 0; i < MR; i++) {
        float *c_i = c + i * ldc;
        store(c_i, accumulate ? load(c_i) + sum[i][0] : sum[i][0]);
        store(c_i + W, accumulate ? load(c_i + W) + sum[i][1] : sum[i][1]);
    }
}

void rung_vectorised(float *restrict c, const float *restrict a, const float *restrict b, int64_t n) {
    for (int64_t j = 0; j < n; j += NR)
        for (int64_t i = 0; i < n; i += MR) tile(c + i * n + j, n, a + i * n, n, 1, b + j, n, n, 0);
}

// ---- rung 4: packed -------------------------------------------------------------------------------------------------

enum { KC = 256, MC = 96 };  // a panel of b, 256 x 16, stays in the first-level cache; 96 rows of a in the second

// The same tile, but both operands are first copied into the order in which it reads them. The tile then walks through
// memory in two straight lines: no address arithmetic, every cache line whole, no two rows in one cache set.
void rung_packed(float *restrict c, const float *restrict a, const float *restrict b, int64_t n) {
    float *b_panels = aligned_alloc(64, KC * n * sizeof *b_panels);    // n / NR panels of [k][NR]
    float *a_tiles = aligned_alloc(64, MC * KC * sizeof *a_tiles);     // MC / MR tiles of [k][MR]
    for (int64_t k0 = 0; k0 < n; k0 += KC) {
        int64_t depth = n - k0 < KC ? n - k0 : KC;
        for (int64_t j = 0; j < n; j += NR)
            for (int64_t l = 0; l < depth; l++)
                memcpy(b_panels + j * depth + l * NR, b + (k0 + l) * n + j, NR * sizeof *b);
        for (int64_t i0 = 0; i0 < n; i0 += MC) {
            for (int64_t i = 0; i < MC; i += MR)
                for (int64_t r = 0; r < MR; r++)
                    for (int64_t l = 0; l < depth; l++)
                        a_tiles[i * depth + l * MR + r] = a[(i0 + i + r) * n + k0 + l];
            for (int64_t j = 0; j < n; j += NR)
                for (int64_t i = 0; i < MC; i += MR)
                    tile(c + (i0 + i) * n + j, n, a_tiles + i * depth, 1, MR, b_panels + j * depth, NR, depth, k0 > 0);
        }
    }
    free(b_panels);
    free(a_tiles);
}
