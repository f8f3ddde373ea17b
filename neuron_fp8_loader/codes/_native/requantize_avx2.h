/* What the AVX2 files of the requantizer share. */
#ifndef NEURON_FP8_REQUANTIZE_AVX2_H
#define NEURON_FP8_REQUANTIZE_AVX2_H

#include <string.h>

#include "avx2.h"
#include "requantize.h"

/* Magnitude codes of 32 codes, NaN as 0. */
AVX2 FP8_INLINE __m256i magnitudes(__m256i byte) {
    const __m256i code = _mm256_and_si256(byte, _mm256_set1_epi8(FP8_MAGNITUDE));
    return _mm256_andnot_si256(_mm256_cmpeq_epi8(code, _mm256_set1_epi8(FP8_NAN)), code);
}

/* n codes from 1 to 32, followed by zeros, which neither a maximum nor a sum sees. */
AVX2 FP8_INLINE __m256i load_some(const uint8_t *src, size_t n) {
    if (n >= 32) return load32(src);
    uint8_t some[32] = {0};
    memcpy(some, src, n);
    return load32(some);
}

/* The values of eight finite magnitude codes. */
AVX2 FP8_INLINE __m256 eight_values(const uint8_t *code) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)code));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 20)), _mm256_set1_ps(0x1p120f));
}

/* x minus the nearest of the format's numbers, exactly. */
AVX2 FP8_INLINE __m256 rounding(__m256 x) {
    const __m256i power = _mm256_and_si256(_mm256_castps_si256(_mm256_max_ps(x, _mm256_set1_ps(0x1p-6f))),
                                           _mm256_set1_epi32(0x7f800000));
    const __m256 large = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(20 << 23)));
    return _mm256_sub_ps(x, _mm256_sub_ps(_mm256_add_ps(x, large), large));
}

void fp8_measure_avx2(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                      double sums[1 + FP8_CANDIDATES]);
void fp8_know_avx2(fp8_band *band);
void fp8_estimate_avx2(const uint8_t *src, const fp8_band *band, const float candidate[FP8_CANDIDATES],
                       fp8_weighed *found);

/* How far up the eight mantissas go when they are rounded under the ratio, less 8 for each power of two in it: a byte
 * each; and the ratio's exponent. */
uint64_t fp8_steps_avx2(double ratio, int32_t *exponent);

#endif
