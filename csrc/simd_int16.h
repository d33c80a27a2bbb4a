// Whole numbers of 16 bits, for packed_fixed.c.inc: what simd.h's vectors of floats cannot say.
//
// 64 numbers of 16 bits that 32 bytes of nibbles stand for, high nibbles first, as four vectors of 16; and the sum of
// their products with 64 others as eight lanes, whatever W is: a lane adds eight products in 32 bits, and is exact.
//
// Byte shuffles look up the lower bytes and the upper bytes; zipped, 8 of one half of 16 bytes with 8 of the next 16
// bytes', these are numbers. AVX-512 looks up numbers of 16 bits, of each the lowest nibble, and shifts the next one
// down. No lane is moved to make an order of it: `vw_spread` gives the others the same order.
#ifndef ENT_SIMD_INT16_H
#define ENT_SIMD_INT16_H

#include "simd.h"
#ifdef __aarch64__
#include <arm_neon.h>
#endif

enum { GROUP = 64 };
typedef float vs __attribute__((vector_size(32)));
ALWAYS_INLINE vs vs_set(float x) { return (vs){x, x, x, x, x, x, x, x}; }
ALWAYS_INLINE float vs_sum(vs v) {
    typedef float half __attribute__((vector_size(16)));
    half of[2];
    memcpy(of, &v, sizeof of);
    const half sum = of[0] + of[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// to = the lower halves of 64 numbers, which hold what they are in 16 bits
#if defined(__AVX512BW__) && defined(__AVX512VL__)
ALWAYS_INLINE void vw_spread(int16_t *restrict to, const int32_t *restrict from) {
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 16; i++) to[16 * k + i] = (int16_t)from[4 * i + k];
}
#else
ALWAYS_INLINE void vw_spread(int16_t *restrict to, const int32_t *restrict from) {
    for (int half = 0; half < 4; half++, from += 16) {
        int16_t *even = to + half % 2 * 16 + half / 2 * 8, *odd = even + 32;
        for (int i = 0; i < 8; i++) even[i] = (int16_t)from[2 * i], odd[i] = (int16_t)from[2 * i + 1];
    }
}
#endif

#if defined(__AVX2__)
typedef __m256i vw;
ALWAYS_INLINE vs vw_dot(const vw v[4], const int16_t *x) {
    vw pairs[4];
    for (int k = 0; k < 4; k++) pairs[k] = _mm256_madd_epi16(v[k], _mm256_loadu_si256((const vw *)x + k));
    return (vs)_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(pairs[0], pairs[1]),
                                                   _mm256_add_epi32(pairs[2], pairs[3])));
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
typedef vw vw_table;
ALWAYS_INLINE vw_table vw_table_load(const int16_t *p) { return _mm256_loadu_si256((const void *)p); }
ALWAYS_INLINE void vw_lookup(vw v[4], vw_table t, const uint8_t *bytes) {  // only 4 bits of an index count
    const vw both = _mm256_loadu_si256((const void *)bytes);
    v[0] = _mm256_permutexvar_epi16(_mm256_srli_epi16(both, 4), t), v[1] = _mm256_permutexvar_epi16(both, t);
    v[2] = _mm256_permutexvar_epi16(_mm256_srli_epi16(both, 12), t);
    v[3] = _mm256_permutexvar_epi16(_mm256_srli_epi16(both, 8), t);
}
#elif defined(__AVX2__)
typedef struct { vw lower, upper; } vw_table;  // the bytes of 16 numbers, twice
ALWAYS_INLINE vw_table vw_table_load(const int16_t *p) {
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i first = _mm_shuffle_epi8(_mm_loadu_si128((const void *)p), split);
    const __m128i last = _mm_shuffle_epi8(_mm_loadu_si128((const void *)(p + 8)), split);
    return (vw_table){_mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, last)),
                      _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(first, last))};
}
ALWAYS_INLINE void vw_lookup(vw v[4], vw_table t, const uint8_t *bytes) {
    const vw both = _mm256_loadu_si256((const void *)bytes), nibble = _mm256_set1_epi8(15);
    const vw high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), low = _mm256_and_si256(both, nibble);
    const vw even0 = _mm256_shuffle_epi8(t.lower, high), even1 = _mm256_shuffle_epi8(t.upper, high);
    const vw odd0 = _mm256_shuffle_epi8(t.lower, low), odd1 = _mm256_shuffle_epi8(t.upper, low);
    v[0] = _mm256_unpacklo_epi8(even0, even1), v[1] = _mm256_unpackhi_epi8(even0, even1);
    v[2] = _mm256_unpacklo_epi8(odd0, odd1), v[3] = _mm256_unpackhi_epi8(odd0, odd1);
}
#elif defined(__aarch64__)
typedef struct { int16x8_t half[2]; } vw;
typedef struct { uint8x16_t lower, upper; } vw_table;
ALWAYS_INLINE vw_table vw_table_load(const int16_t *p) {
    const uint8x16x2_t bytes = vld2q_u8((const uint8_t *)p);
    return (vw_table){bytes.val[0], bytes.val[1]};
}
ALWAYS_INLINE void vw_lookup(vw v[4], vw_table t, const uint8_t *bytes) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t both = vld1q_u8(bytes + 16 * i);
        const uint8x16_t high = vshrq_n_u8(both, 4), low = vandq_u8(both, vdupq_n_u8(15));
        const uint8x16_t even0 = vqtbl1q_u8(t.lower, high), even1 = vqtbl1q_u8(t.upper, high);
        const uint8x16_t odd0 = vqtbl1q_u8(t.lower, low), odd1 = vqtbl1q_u8(t.upper, low);
        v[0].half[i] = (int16x8_t)vzip1q_u8(even0, even1), v[1].half[i] = (int16x8_t)vzip2q_u8(even0, even1);
        v[2].half[i] = (int16x8_t)vzip1q_u8(odd0, odd1), v[3].half[i] = (int16x8_t)vzip2q_u8(odd0, odd1);
    }
}
ALWAYS_INLINE vs vw_dot(const vw v[4], const int16_t *x) {
    float32x4_t sums[2];
    for (int i = 0; i < 2; i++) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int k = 0; k < 4; k++) {
            const int16x8_t a = v[k].half[i], b = vld1q_s16(x + 16 * k + 8 * i);
            sum = vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
        }
        sums[i] = vcvtq_f32_s32(sum);
    }
    vs v8;
    memcpy(&v8, sums, sizeof v8);
    return v8;
}
#else
typedef struct { int16_t number[16]; } vw;
typedef const int16_t *vw_table;
ALWAYS_INLINE vw_table vw_table_load(const int16_t *p) { return p; }
ALWAYS_INLINE void vw_lookup(vw v[4], vw_table t, const uint8_t *bytes) {
    int32_t numbers[GROUP];
    for (int i = 0; i < GROUP / 2; i++) numbers[2 * i] = t[bytes[i] >> 4], numbers[2 * i + 1] = t[bytes[i] & 15];
    vw_spread((int16_t *)v, numbers);
}
ALWAYS_INLINE vs vw_dot(const vw v[4], const int16_t *x) {
    int32_t sum[8] = {0};
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 16; i++) sum[i / 2] += v[k].number[i] * x[16 * k + i];
    vs v8;
    for (int i = 0; i < 8; i++) v8[i] = (float)sum[i];
    return v8;
}
#endif

#endif
