// The vector vocabulary all kernels are written in: W float lanes, over the compilers' vector extensions.
// The instruction set comes from compiler flags alone: W is 16 with AVX-512, 8 with AVX2, else 4 (SSE2, NEON).
// ENT_W forces another width: 16 lanes compiled for AVX2 test the logic of the AVX-512 build without its hardware.
#ifndef ENT_SIMD_H
#define ENT_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef ENT_W
#if defined(__AVX512F__)
#define ENT_W 16
#elif defined(__AVX2__)
#define ENT_W 8
#else
#define ENT_W 4
#endif
#endif
enum { W = ENT_W };

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
ALWAYS_INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
ALWAYS_INLINE int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

typedef float vf __attribute__((vector_size(4 * ENT_W)));    // W floats
typedef int32_t vi __attribute__((vector_size(4 * ENT_W)));  // W integers; a mask has lanes of 0 or -1
typedef uint32_t vu __attribute__((vector_size(4 * ENT_W)));  // for bit patterns
typedef float vf_in_memory __attribute__((vector_size(4 * ENT_W), aligned(4), may_alias));

ALWAYS_INLINE vf vf_load(const float *p) { return *(const vf_in_memory *)p; }
ALWAYS_INLINE void vf_store(float *p, vf v) { *(vf_in_memory *)p = v; }

#if ENT_W == 16
#define EACH_LANE(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#elif ENT_W == 8
#define EACH_LANE(x) x, x, x, x, x, x, x, x
#else
#define EACH_LANE(x) x, x, x, x
#endif
ALWAYS_INLINE vf vf_set(float x) { return (vf){EACH_LANE(x)}; }
ALWAYS_INLINE vi vi_set(int32_t x) { return (vi){EACH_LANE(x)}; }
ALWAYS_INLINE vf vf_zero(void) { return (vf){0}; }

// a * b + c, rounded once where the processor has FMA (both compilers contract one expression), twice on baseline.
ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }

// Lanes of a where the mask is set, else of b.
ALWAYS_INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// bfloat16 is the upper half of a float32. Here it is in the lower half of each lane, rounded to the nearest, halves to
// even; nan stays nan.
ALWAYS_INLINE vu vf_round_bfloat16(vf x) {
    const vu bits = (vu)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return (vu)vf_select(x == x, (vf)rounded, (vf)(bits | 0x400000u)) >> 16;
}

// sum + a0 b0 + a1 b1 of each lane's pair of bfloat16, the first in the lower half. Assembly, because the intrinsic
// wants the whole function compiled for processors that have it; asking which have it is arithmetic_of's part.
#if ENT_W == 16 && defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define VDPBF16PS
#endif
#ifdef VDPBF16PS
enum { EMULATES_PAIRS = 0 };
ALWAYS_INLINE vf vf_add_pairs(vf sum, vf a, vf b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#else
enum { EMULATES_PAIRS = ENT_W == 16 };  // the build "wide"
ALWAYS_INLINE vf vf_add_pairs(vf sum, vf a, vf b) {
    const vu upper = (vu){0} - 0x10000u;
    sum = vf_fma((vf)((vu)a & upper), (vf)((vu)b & upper), sum);
    return vf_fma((vf)((vu)a << 16), (vf)((vu)b << 16), sum);
}
#endif

// Greater, lesser, square root. If either lane is nan the first operand is the answer, so a nan in `a` stays
// and one in `b` is dropped. Intrinsics: compare and select is three instructions instead of one, and a loop
// over lanes ends as W scalar branches where it is inlined (softmax of 2048 x 1024: 3.3 ms instead of 0.6).
#if defined(__AVX512F__) && ENT_W == 16
#define X86(op) (vf)_mm512_##op##_ps
#define X86_VOID(op) _mm512_##op##_ps
typedef __m512 x86;
#elif defined(__AVX__) && ENT_W == 8
#define X86(op) (vf)_mm256_##op##_ps
#define X86_VOID(op) _mm256_##op##_ps
typedef __m256 x86;
#elif defined(__SSE2__) && ENT_W == 4
#define X86(op) (vf)_mm_##op##_ps
#define X86_VOID(op) _mm_##op##_ps
typedef __m128 x86;
#endif
#ifdef X86  // maxps and minps answer with their second operand when there is a nan
ALWAYS_INLINE vf vf_max(vf a, vf b) { return X86(max)((x86)b, (x86)a); }
ALWAYS_INLINE vf vf_min(vf a, vf b) { return X86(min)((x86)b, (x86)a); }
ALWAYS_INLINE vf vf_sqrt(vf a) { return X86(sqrt)((x86)a); }
#else
ALWAYS_INLINE vf vf_max(vf a, vf b) { return vf_select(b > a, b, a); }
ALWAYS_INLINE vf vf_min(vf a, vf b) { return vf_select(b < a, b, a); }
ALWAYS_INLINE vf vf_sqrt(vf a) {
    for (int i = 0; i < W; i++) a[i] = sqrtf(a[i]);
    return a;
}
#endif
ALWAYS_INLINE vf vf_abs(vf a) { return (vf)((vi)a & vi_set(0x7fffffff)); }

// Sum and maximum over lanes as a fixed tree, halves folded onto each other. Every loop has a constant count: a
// loop over halves stays a loop, through memory, when W is 16.
#define FOLD_LANES(v, op)                                                             \
    float lane[ENT_W];                                                                \
    vf_store(lane, v);                                                                \
    if (W >= 16) for (int i = 0; i < 8; i++) lane[i] = op(lane[i], lane[i + 8 % W]);  \
    if (W >= 8) for (int i = 0; i < 4; i++) lane[i] = op(lane[i], lane[i + 4 % W]);   \
    for (int i = 0; i < 2; i++) lane[i] = op(lane[i], lane[i + 2]);                   \
    return op(lane[0], lane[1]);
#define ADD_LANE(a, b) ((a) + (b))
#define MAX_LANE(a, b) ((b) > (a) ? (b) : (a))
ALWAYS_INLINE float vf_sum(vf v) { FOLD_LANES(v, ADD_LANE) }
ALWAYS_INLINE float vf_hmax(vf v) { FOLD_LANES(v, MAX_LANE) }

// Tails: the first n < W lanes; the others read as `fill`, and neither they nor their memory are touched.
// Intrinsics here, because compilers unroll the plain loop into a branch for every lane where it is inlined:
// rope of heads of 48 took 38 ns a head so with 16 lanes, and 5 ns with masks.
#if defined(__AVX512F__) && ENT_W == 16
ALWAYS_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
ALWAYS_INLINE vf vf_load_n(const float *p, int64_t n, float fill) {
    return (vf)_mm512_mask_loadu_ps((__m512)vf_set(fill), first_lanes(n), p);
}
ALWAYS_INLINE void vf_store_n(float *p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
#elif defined(__AVX2__) && ENT_W == 8
ALWAYS_INLINE vi first_lanes(int64_t n) { return (vi){0, 1, 2, 3, 4, 5, 6, 7} < vi_set((int32_t)n); }
ALWAYS_INLINE vf vf_load_n(const float *p, int64_t n, float fill) {
    const vi lanes = first_lanes(n);
    return vf_select(lanes, (vf)_mm256_maskload_ps(p, (__m256i)lanes), vf_set(fill));
}
ALWAYS_INLINE void vf_store_n(float *p, vf v, int64_t n) {
    _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
}
#else
ALWAYS_INLINE vf vf_load_n(const float *p, int64_t n, float fill) {
    float lane[ENT_W];
    for (int i = 0; i < ENT_W; i++) lane[i] = i < n ? p[i] : fill;
    return vf_load(lane);
}
ALWAYS_INLINE void vf_store_n(float *p, vf v, int64_t n) {
    float lane[ENT_W];
    vf_store(lane, v);
    for (int i = 0; i < ENT_W; i++)
        if (i < n) p[i] = lane[i];
}
#endif

// Stores past the caches, p a multiple of sizeof(vf): an ordinary store first reads the line that it overwrites. The
// last one is followed by a fence, for other threads to see them.
#ifdef X86
ALWAYS_INLINE void vf_stream(float *p, vf v) { X86_VOID(stream)(p, (x86)v); }
ALWAYS_INLINE void stream_fence(void) { _mm_sfence(); }
#else
ALWAYS_INLINE void vf_stream(float *p, vf v) { vf_store(p, v); }
ALWAYS_INLINE void stream_fence(void) {}
#endif
ALWAYS_INLINE int64_t until_aligned(const float *p) { return (int64_t)(-(uintptr_t)p % sizeof(vf) / sizeof *p); }

// ---- transposition ------------------------------------------------------------------------------------------------

// v[i][j] <-> v[j][i] for W x W lanes, in log2(W) rounds. A round of size s swaps, in every 2s x 2s block, the upper
// right s x s numbers with the lower left ones: row i takes the lanes UPPER of rows (i, i + s), row i + s the LOWER.
#define UPPER(s, j) ((j) & (s) ? ENT_W + (j) - (s) : (j))
#define LOWER(s, j) ((j) & (s) ? ENT_W + (j) : (j) + (s))
#define LANES_4(f, s, j) f(s, j), f(s, j + 1), f(s, j + 2), f(s, j + 3)
#if ENT_W == 16
#define LANES(f, s) LANES_4(f, s, 0), LANES_4(f, s, 4), LANES_4(f, s, 8), LANES_4(f, s, 12)
#elif ENT_W == 8
#define LANES(f, s) LANES_4(f, s, 0), LANES_4(f, s, 4)
#else
#define LANES(f, s) LANES_4(f, s, 0)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, LANES(f, s))
#else
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (vi){LANES(f, s)})
#endif
#define TRANSPOSE_ROUND(v, s)                                                                      \
    _Pragma("GCC unroll 16") for (int i = 0; i < ENT_W; i++) if (!(i & (s))) {                     \
        vf upper = SHUFFLE(v[i], v[i + (s)], UPPER, s), lower = SHUFFLE(v[i], v[i + (s)], LOWER, s); \
        v[i] = upper, v[i + (s)] = lower;                                                          \
    }
ALWAYS_INLINE void vf_transpose(vf v[ENT_W]) {
    TRANSPOSE_ROUND(v, 1)
    TRANSPOSE_ROUND(v, 2)
#if ENT_W >= 8
    TRANSPOSE_ROUND(v, 4)
#endif
#if ENT_W >= 16
    TRANSPOSE_ROUND(v, 8)
#endif
}

// Two vectors zipped: a0 b0 a1 b1 ..., the lower halves and the upper ones.
#define ZIP_LOWER(s, j) ((j) / 2 + ((j) & 1 ? ENT_W : 0))
#define ZIP_UPPER(s, j) ((j) / 2 + ENT_W / 2 + ((j) & 1 ? ENT_W : 0))

// ---- bytes and tables -----------------------------------------------------------------------------------------------

// W bytes, signed bytes or 16-bit numbers as W integers. Intrinsics: gcc 12 makes __builtin_convertvector go lane by
// lane.
#if defined(__AVX512F__) && ENT_W == 16
ALWAYS_INLINE vi vi_from_bytes(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
ALWAYS_INLINE vi vi_from_int8(const int8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
ALWAYS_INLINE vi vi_from_uint16(const uint16_t *p) {
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
}
#elif defined(__AVX2__) && ENT_W == 8
ALWAYS_INLINE vi vi_from_bytes(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
ALWAYS_INLINE vi vi_from_int8(const int8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
ALWAYS_INLINE vi vi_from_uint16(const uint16_t *p) {
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
}
#else
#define WIDENED(p)                                           \
    int32_t lane[ENT_W];                                     \
    for (int i = 0; i < ENT_W; i++) lane[i] = (p)[i];        \
    vi v;                                                    \
    memcpy(&v, lane, sizeof v);                              \
    return v;
ALWAYS_INLINE vi vi_from_bytes(const uint8_t *p) { WIDENED(p) }
ALWAYS_INLINE vi vi_from_int8(const int8_t *p) { WIDENED(p) }
ALWAYS_INLINE vi vi_from_uint16(const uint16_t *p) { WIDENED(p) }
#endif

// A table of 16 floats in registers, and the 32 values that 16 bytes of nibbles stand for, high nibbles first. No lane
// is moved that need not be: in every LOOKUP_GROUP values those of even index come first, then those of odd index;
// `vf_in_order` undoes that.
#if ENT_W == 16
enum { LOOKUP_GROUP = 32 };
#else
enum { LOOKUP_GROUP = 8 };
#endif
enum { LOOKUPS = 32 / W };  // vectors
#if defined(__AVX512F__) && ENT_W == 16
typedef vf vf_table;
ALWAYS_INLINE vf_table vf_table_load(const float *p) { return vf_load(p); }
ALWAYS_INLINE void vf_lookup(vf v[LOOKUPS], vf_table t, const uint8_t *bytes) {  // only 4 bits of an index count
    const vi i = vi_from_bytes(bytes);
    v[0] = (vf)_mm512_permutexvar_ps((__m512i)(i >> 4), (__m512)t);
    v[1] = (vf)_mm512_permutexvar_ps((__m512i)i, (__m512)t);
}
#elif defined(__AVX2__) && ENT_W == 8
// The table as four planes, one for each byte of a float: a byte shuffle looks up 32 bytes at once, where a shuffle of
// floats knows tables of 8 only.
typedef struct { __m256i plane[4]; } vf_table;
ALWAYS_INLINE vf_table vf_table_load(const float *p) {
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 4 * i)), bytes);
    const __m128i lower01 = _mm_unpacklo_epi32(q[0], q[1]), upper01 = _mm_unpackhi_epi32(q[0], q[1]);
    const __m128i lower23 = _mm_unpacklo_epi32(q[2], q[3]), upper23 = _mm_unpackhi_epi32(q[2], q[3]);
    return (vf_table){{_mm256_broadcastsi128_si256(_mm_unpacklo_epi64(lower01, lower23)),
                       _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(lower01, lower23)),
                       _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(upper01, upper23)),
                       _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(upper01, upper23))}};
}
ALWAYS_INLINE void vf_lookup(vf v[LOOKUPS], vf_table t, const uint8_t *bytes) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    const __m256i i = _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
    const __m256i b0 = _mm256_shuffle_epi8(t.plane[0], i), b1 = _mm256_shuffle_epi8(t.plane[1], i);
    const __m256i b2 = _mm256_shuffle_epi8(t.plane[2], i), b3 = _mm256_shuffle_epi8(t.plane[3], i);
    const __m256i lower0 = _mm256_unpacklo_epi8(b0, b1), lower2 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i upper0 = _mm256_unpackhi_epi8(b0, b1), upper2 = _mm256_unpackhi_epi8(b2, b3);
    v[0] = (vf)_mm256_unpacklo_epi16(lower0, lower2), v[1] = (vf)_mm256_unpackhi_epi16(lower0, lower2);
    v[2] = (vf)_mm256_unpacklo_epi16(upper0, upper2), v[3] = (vf)_mm256_unpackhi_epi16(upper0, upper2);
}
#else
typedef const float *vf_table;
ALWAYS_INLINE vf_table vf_table_load(const float *p) { return p; }
ALWAYS_INLINE void vf_lookup(vf v[LOOKUPS], vf_table t, const uint8_t *bytes) {
    float values[32];
    for (int g = 0; g < 32; g += LOOKUP_GROUP)
        for (int i = 0; i < LOOKUP_GROUP / 2; i++) {
            const uint8_t byte = bytes[g / 2 + i];
            values[g + i] = t[byte >> 4], values[g + LOOKUP_GROUP / 2 + i] = t[byte & 15];
        }
    for (int i = 0; i < LOOKUPS; i++) v[i] = vf_load(values + i * W);
}
#endif
ALWAYS_INLINE void vf_in_order(vf v[LOOKUPS]) {
#if ENT_W == 8
#define HALVES_ZIPPED(s, j) ((j) / 2 + ((j) & 1 ? 4 : 0))
    for (int i = 0; i < LOOKUPS; i++) v[i] = SHUFFLE(v[i], v[i], HALVES_ZIPPED, 0);
#else
    for (int i = 0; i < LOOKUPS; i += 2) {
        const vf even = v[i], odd = v[i + 1];
        v[i] = SHUFFLE(even, odd, ZIP_LOWER, 0), v[i + 1] = SHUFFLE(even, odd, ZIP_UPPER, 0);
    }
#endif
}

// ---- exponential and logarithm ----------------------------------------------------------------------------------

// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r by a minimax polynomial of degree 6
// (coefficients rounded to float one after the other, the next fitted to the rounded ones). Worst error over
// all floats 0.90 ulp, 1.2 without FMA.
// Results below 2^-125.5 = 1.7e-38 are flushed to 0; exp(-inf) = 0, above 88.7229 inf, nan stays nan.
// The polynomial gives 2 e^r and the scale is 2^(n-1): so n = 128 needs no case of its own.
// This one is for x <= 89 or nan, as a number less its row's maximum always is.
ALWAYS_INLINE vf vf_exp_bounded(vf x) {
    x = vf_max(x, vf_set(-87.3f));                                // n in -126..128
    const vf shift = vf_set(0x1.8p+23f);                          // adding it rounds to an integer,
    const vf shifted = vf_fma(x, vf_set(0x1.715476p+0f), shift);  // left in the low bits
    const vf n = shifted - shift;
    vf r = vf_fma(n, vf_set(-0x1.63p-1f), x);   // ln 2 in two parts, Cody and Waite:
    r = vf_fma(n, vf_set(0x1.bd0106p-13f), r);  // n times the first is exact
    vf y = vf_set(0x1.6a511ap-9f);
    y = vf_fma(y, r, vf_set(0x1.12397cp-6f));
    y = vf_fma(y, r, vf_set(0x1.5558acp-4f));
    y = vf_fma(y, r, vf_set(0x1.555492p-2f));
    y = vf_fma(y, r, vf_set(0x1.fffffcp-1f));
    y = vf_fma(y, r, vf_set(2.0f));
    y = vf_fma(y, r, vf_set(2.0f));
    // n = -126 makes the scale's bits zero, which is the flush. Unsigned, because the shift overflows.
    return y * (vf)(((vu)shifted << 23) + 0x3f000000u);
}
ALWAYS_INLINE vf vf_exp(vf x) { return vf_exp_bounded(vf_min(x, vf_set(89.0f))); }

#endif
