// Every kernel, as a contract: the formula, the shapes, what may alias. Outputs come first, inputs are const, sizes
// last. Kernels trust their callers (entrenar/kernels/native.py checks), never allocate, print or exit; `scratch` is
// the caller's, its size in floats is given here. Where that depends on the number of threads, so does the kernel: it
// uses `threads` of them, the same number as the size was asked for.
//
// This file holds comments, structs and prototypes, one type per parameter: csrc/build_kernels.py reads it to make the
// table of function pointers per instruction set, and cffi reads it to make the Python module. Adding a kernel is one
// prototype here, its code in a .c.inc, and a wrapper in native.py.
//
// B batch, T time, S key/value length, C channels, H heads, KH key/value heads, D head dim, V vocabulary, N rows

// ---- packed.c.inc, matmul.c.inc -----------------------------------------------------------------------------------

// A frozen matrix of rows x columns in a storage format: entrenar/kernels/packed.py says which there are.
// codes: nibbles, int8 or uint16 by kind; table: the 16 values of a nibble. Scales are `scales`, one for each `block`
// values of the flat matrix, or, where that is NULL, nested_table[nested_codes[i]] * nested_absmax[i / nested_block]
// + nested_offset. Where `bfloat16` is not 0, products of more than 8 rows round both operands to it. Where `integers`
// is not NULL, y = x W^T of up to 8 rows is made of whole numbers: it is the table times integer_scale, rounded; block
// is 64, and divides columns.
typedef struct {
    const uint8_t *codes;
    const float *table;
    const float *scales;
    const uint8_t *nested_codes;
    const float *nested_table;
    const float *nested_absmax;
    const int16_t *integers;
    double nested_offset, integer_scale;
    int64_t kind, rows, columns, block, nested_block, bfloat16;
} ent_packed;

// to (rows, columns) = the floats w stands for; to (n, columns) = those of its rows rows[i] only
void ent_unpack(float *restrict to, const ent_packed *w);
void ent_unpack_rows(float *restrict to, const ent_packed *w, const int64_t *restrict rows, int64_t n);

// y (N, O) = x W^T,  dx (N, I) = dy W;  x (N, I), dy (N, O), w (O, I), all contiguous; `scratch` holds
// ent_packed_linear_scratch(threads, N, I) floats, 64-byte aligned
void ent_packed_linear(float *restrict y, const float *restrict x, const ent_packed *w, float *restrict scratch,
                       int64_t threads, int64_t N);
// y = x W^T of each of `count` matrices with as many columns, one (N, O) after the other: bit for bit as one by one,
// but for few rows threads are woken once. `scratch` as for one
void ent_packed_linears(float *restrict y, const float *restrict x, const ent_packed *const *ws, int64_t count,
                        float *restrict scratch, int64_t threads, int64_t N);
int64_t ent_packed_linear_scratch(int64_t threads, int64_t N, int64_t I);
void ent_packed_linear_backward(float *restrict dx, const float *restrict dy, const ent_packed *w,
                                float *restrict scratch, int64_t threads, int64_t N);

// Whether this instruction set multiplies bfloat16 at twice the speed of floats, on this processor.
int64_t ent_multiplies_bfloat16(void);

// c[g,m,n] = sum_k a[g,m,k] b[g,k,n], or += with `accumulate`
// a (G, M, K), b (G, K, N) by element strides, c (G, M, N) contiguous. One of a's last two strides is 1, and one of
// b's; a group stride of 0 broadcasts. `scratch` holds ent_matmul_scratch(threads) floats, 64-byte aligned.
void ent_matmul(float *restrict c, const float *a, const float *b, float *restrict scratch, int64_t threads,
                int64_t groups, int64_t m, int64_t n, int64_t k, int64_t a_group, int64_t a_row, int64_t a_col,
                int64_t b_group, int64_t b_row, int64_t b_col, int64_t accumulate);
int64_t ent_matmul_scratch(int64_t threads);

// ---- rows.c.inc, norm.c.inc, rope.c.inc, swiglu.c.inc, loss.c.inc, embedding.c.inc, optimizer.c.inc ---------------

// y[n,c] = exp(x[n,c]) / sum_c exp(x[n,c]);  x, y (N, C);  y may be x;  a row of -inf gives zeros
void ent_softmax_forward(float *y, const float *x, int64_t N, int64_t C);
// dx = y * (dy - sum_c dy * y);  dy, y, dx (N, C);  dx may be dy or y
void ent_softmax_backward(float *dx, const float *dy, const float *y, int64_t N, int64_t C);
// y[n,c] = x[n,c] - log sum_c exp(x[n,c]);  x, y (N, C);  y may be x;  a row of -inf stays one
void ent_log_softmax_forward(float *y, const float *x, int64_t N, int64_t C);
// dx = dy - exp(y) * sum_c dy;  dy, y, dx (N, C);  dx may be dy or y
void ent_log_softmax_backward(float *dx, const float *dy, const float *y, int64_t N, int64_t C);

// y[n,c] = x[n,c] * rstd[n] * w[c],  rstd[n] = 1 / sqrt(mean_c x[n,c]^2 + eps);  x, y (N, C), w (C), rstd (N)
void ent_rms_norm_forward(float *restrict y, float *restrict rstd, const float *restrict x,
                          const float *restrict w, float eps, int64_t N, int64_t C);
// dx[n] = rstd * (g - m * mean_c(g * m)),  dw = sum_n dy * m,  with g = dy * w, m = x * rstd
// dx, dy, x (N, C), w, dw (C), rstd (N);  scratch ent_norm_blocks(N) * C floats
void ent_rms_norm_backward(float *restrict dx, float *restrict dw, const float *restrict dy,
                           const float *restrict x, const float *restrict w, const float *restrict rstd,
                           int64_t N, int64_t C, float *restrict scratch);
// y = (x - mean) * rstd * w + bias,  rstd[n] = 1 / sqrt(var_c x[n,c] + eps)
// x, y (N, C), w, bias (C), mean, rstd (N)
void ent_layer_norm_forward(float *restrict y, float *restrict mean, float *restrict rstd,
                            const float *restrict x, const float *restrict w, const float *restrict bias,
                            float eps, int64_t N, int64_t C);
// dx[n] = rstd * (g - mean_c(g) - m * mean_c(g * m)),  dw = sum_n dy * m,  db = sum_n dy
// with g = dy * w, m = (x - mean) * rstd;  dx, dy, x (N, C), w, dw, db (C), mean, rstd (N)
// scratch 2 * ent_norm_blocks(N) * C floats
void ent_layer_norm_backward(float *restrict dx, float *restrict dw, float *restrict db,
                             const float *restrict dy, const float *restrict x, const float *restrict w,
                             const float *restrict mean, const float *restrict rstd, int64_t N, int64_t C,
                             float *restrict scratch);
// Into how many blocks the backward of a norm of N rows cuts its sums.
int64_t ent_norm_blocks(int64_t N);

// y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;  x1, x2 the halves of x;  x, y (B, T, H, 2K), cos, sin (T, K)
void ent_rope_forward(float *restrict y, const float *restrict x, const float *restrict cos,
                      const float *restrict sin, int64_t B, int64_t T, int64_t H, int64_t K);
// The rotation back;  dy, dx (B, T, H, 2K), cos, sin (T, K)
void ent_rope_backward(float *restrict dx, const float *restrict dy, const float *restrict cos,
                       const float *restrict sin, int64_t B, int64_t T, int64_t H, int64_t K);

// y = gate * sigmoid(gate) * up;  all n
void ent_swiglu_forward(float *restrict y, const float *restrict gate, const float *restrict up, int64_t n);
// dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * gate * s,  with s = sigmoid(gate);  all n
void ent_swiglu_backward(float *restrict dgate, float *restrict dup, const float *restrict dy,
                         const float *restrict gate, const float *restrict up, int64_t n);

// losses[n] = lse[n] - logits[n,targets[n]], 0 where ignored,  lse[n] = log sum_v exp(logits[n,v])
// logits (N, V), losses, lse, targets (N), each target in [0, V) or equal to ignore_index
void ent_cross_entropy_forward(float *restrict losses, float *restrict lse, const float *restrict logits,
                               const int64_t *restrict targets, int64_t ignore_index, int64_t N, int64_t V);
// dlogits[n] = dlosses[n] * (exp(logits[n] - lse[n]) - onehot(targets[n])), 0 where ignored;  shapes as above
void ent_cross_entropy_backward(float *restrict dlogits, const float *restrict dlosses,
                                const float *restrict logits, const int64_t *restrict targets,
                                const float *restrict lse, int64_t ignore_index, int64_t N, int64_t V);

// dw[ids[n]] += dy[n], for n in order;  dy (N, C), ids (N) of which each is a row of dw (rows, C)
void ent_embedding_backward(float *restrict dw, const float *restrict dy, const int64_t *restrict ids,
                            int64_t N, int64_t C);

// A parameter of the optimizer: n numbers, their moments, their gradient, and decay = learning rate * weight decay.
typedef struct {
    float *p, *m, *v;
    const float *g;
    double decay;
    int64_t n;
} ent_adamw_parameter;

// Of every parameter, with g' = grad_scale * g:
// m = beta1 * m + one_minus_beta1 * g',  v = beta2 * v + one_minus_beta2 * g'^2,
// p = p - decay * p - step_size * m / (sqrt(v * v_correction) + eps);  p, m, v in place, g only read; no two arrays
// overlap
void ent_adamw_steps(const ent_adamw_parameter *parameters, int64_t count, float grad_scale, float beta1,
                     float one_minus_beta1, float beta2, float one_minus_beta2, float v_correction, float eps,
                     float step_size);

// sum_k sum_i x[k][i]^2 in double;  x (count) arrays of sizes (count);  scratch sum_k ceil(sizes[k] / 4096) doubles
double ent_sum_of_squares(const float *const *x, const int64_t *sizes, int64_t count, double *restrict scratch);

// ---- attention.c.inc, linear_cross_entropy.c.inc, packed_mlp.c.inc -----------------------------------------------

// o[b,t,h] = sum_s p[s] v[b,s,y], p = softmax over s <= t + S - T of scale * q[b,t,h] . k[b,s,y], y = h KH / H
// starts (B, T) or NULL: only s >= starts[b,t] then, where S = T, 0 <= starts[b,t] <= t, not decreasing along T
// lse[b,h,t] = the logarithm of the softmax's denominator
// q (B, T, H, D) and k, v (B, S, KH, D) have unit stride along D, and the element strides along their other axes
// in strides (9): B T H of q, B S KH of k, B S KH of v. o (B, T, H, D) and lse (B, H, T) are contiguous; KH
// divides H, S >= T. No dimension is 0. `scratch` holds ent_attention_forward_scratch() floats, linear in S.
void ent_attention_forward(float *restrict o, float *restrict lse, const float *q, const float *k,
                           const float *v, const int64_t *starts, float *restrict scratch, int64_t threads,
                           double scale, int64_t B, int64_t T, int64_t S, int64_t H, int64_t KH, int64_t D,
                           const int64_t *strides);
int64_t ent_attention_forward_scratch(int64_t threads, int64_t B, int64_t T, int64_t S, int64_t H, int64_t KH,
                                      int64_t D);

// The gradients of sum(o * dout), from what the forward took and gave: dq (B, T, H, D), dk, dv (B, S, KH, D),
// dout and o (B, T, H, D), lse (B, H, T) are contiguous; q, k, v, starts and strides as above.
void ent_attention_backward(float *restrict dq, float *restrict dk, float *restrict dv, const float *dout,
                            const float *q, const float *k, const float *v, const float *o, const float *lse,
                            const int64_t *starts, float *restrict scratch, int64_t threads, double scale,
                            int64_t B, int64_t T, int64_t S, int64_t H, int64_t KH, int64_t D,
                            const int64_t *strides);
int64_t ent_attention_backward_scratch(int64_t threads, int64_t B, int64_t T, int64_t S, int64_t H,
                                       int64_t KH, int64_t D);

// losses[r] = logsumexp_v(logits) - logits[targets[r]], logits[v] = sum_c x[r,c] w[v,c], for the N rows r in
// `rows`; dx[r], dw = the gradients of scale * sum of these losses. Other rows of losses and dx are not
// written. The head is w or, where that is NULL, `packed`, which gets no dw. x, dx (.., C), w, dw (V, C), losses,
// targets (..), rows (N), all contiguous; dx, dw or both may be NULL: not wanted. `chunk` rows go together; `scratch`
// holds ent_linear_cross_entropy_scratch() floats, 64-byte aligned.
void ent_linear_cross_entropy(float *restrict losses, float *dx, float *dw, const float *restrict x,
                              const float *restrict w, const ent_packed *packed, const int64_t *restrict targets,
                              const int64_t *restrict rows, float *restrict scratch, int64_t threads,
                              double scale, int64_t N, int64_t C, int64_t V, int64_t chunk);
int64_t ent_linear_cross_entropy_scratch(int64_t threads, int64_t chunk, int64_t C, int64_t V);

// y = (silu(x Wgate^T) * (x Wup^T)) Wdown^T, bit for bit as one by one;  x (N, I), y (N, O), ws = Wgate (F, I),
// Wup (F, I), Wdown (O, F);  `scratch` holds ent_packed_mlp_scratch() floats, 64-byte aligned. None of N, I, F, O is 0.
void ent_packed_mlp(float *restrict y, const float *restrict x, const ent_packed *const *ws, float *restrict scratch,
                    int64_t threads, int64_t N);
int64_t ent_packed_mlp_scratch(int64_t threads, int64_t N, int64_t I, int64_t F);

// ---- peak.c.inc --------------------------------------------------------------------------------------------------

// Runs `rounds` of register-only fused multiply-adds on each of `threads`; returns how many floating-point operations
// one thread did. sink (threads) receives a value per thread so that nothing is optimised away.
double ent_fma_peak(float *sink, int64_t threads, int64_t rounds);

// ---- quantize.c.inc ----------------------------------------------------------------------------------------------

// absmax[b] = max |x| of block b,  codes two to a byte, the first high: order[how many of the 15 bounds lie below
// x / absmax];  x (n), codes (ceil(n/2)), absmax (ceil(n/block)), bounds (15), order (16); block is even.
// Whole blocks are multiplied by 1/absmax, a shorter last one is divided; all finite
void ent_quantize_4bit(uint8_t *restrict codes, float *restrict absmax, const float *restrict x,
                       const float *restrict bounds, const uint8_t *restrict order, int64_t block, int64_t n);
// scales[b] = max |x| / 127 of 32 values,  codes = round(x * (1/scale)), halves away from 0
// x, codes (n), scales (ceil(n/32)); all finite
void ent_quantize_q8_0(int8_t *restrict codes, float *restrict scales, const float *restrict x, int64_t n);
// y = the upper half of x's bits, rounded to the nearest, halves to even; nan stays nan;  x, y (n)
void ent_round_bfloat16(uint16_t *restrict y, const float *restrict x, int64_t n);
