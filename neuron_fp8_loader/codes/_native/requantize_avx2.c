/* The same as the plain C at the end of requantize.c, bit for bit: eight sums, each of every eighth code. */
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include <string.h>

#include "avx2.h"

/* Magnitude codes of 32 codes, NaN as 0. */
AVX2 FP8_INLINE __m256i finite(__m256i byte) {
    const __m256i code = _mm256_and_si256(byte, _mm256_set1_epi8(FP8_MAGNITUDE));
    return _mm256_andnot_si256(_mm256_cmpeq_epi8(code, _mm256_set1_epi8(FP8_NAN)), code);
}

/* n codes from 1 to 32, followed by zeros, which neither a maximum nor a sum sees. */
AVX2 FP8_INLINE __m256i load_some(const uint8_t *src, size_t n) {
    uint8_t some[32] = {0};
    if (n >= 32) return load32(src);
    memcpy(some, src, n);
    return load32(some);
}

AVX2 static uint8_t max_avx2(const uint8_t *src, size_t n) {
    __m256i max = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 32) max = _mm256_max_epu8(max, finite(load_some(src + i, n - i)));
    return max_byte(max);
}

AVX2 FP8_INLINE __m256 rounding(__m256 x) {
    const __m256i power = _mm256_and_si256(_mm256_castps_si256(_mm256_max_ps(x, _mm256_set1_ps(0x1p-6f))),
                                           _mm256_set1_epi32(0x7f800000));
    const __m256 large = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(20 << 23)));
    return _mm256_sub_ps(x, _mm256_sub_ps(_mm256_add_ps(x, large), large));
}

AVX2 static void measure_avx2(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                              double sums[1 + FP8_CANDIDATES]) {
    __m256 lanes[1 + FP8_CANDIDATES], times[FP8_CANDIDATES];
    for (int k = 0; k <= FP8_CANDIDATES; k++) lanes[k] = _mm256_setzero_ps();
    for (int k = 0; k < FP8_CANDIDATES; k++) times[k] = _mm256_set1_ps(ratio[k]);
    for (size_t i = 0; i < n; i += 32) {
        uint8_t code[32];
        store32(code, finite(load_some(src + i, n - i)));
        for (int part = 0; part < 32; part += 8) {
            const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(code + part)));
            const __m256 value =
                _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 20)), _mm256_set1_ps(0x1p120f));
            lanes[0] = _mm256_add_ps(lanes[0], _mm256_mul_ps(value, value));
            for (int k = 0; k < FP8_CANDIDATES; k++) {
                const __m256 change = rounding(_mm256_mul_ps(value, times[k]));
                lanes[1 + k] = _mm256_add_ps(lanes[1 + k], _mm256_mul_ps(change, change));
            }
        }
    }
    for (int k = 0; k <= FP8_CANDIDATES; k++) {
        float lane[FP8_LANES];
        _mm256_storeu_ps(lane, lanes[k]);
        for (int i = 0; i < FP8_LANES; i++) sums[k] += (double)lane[i];
    }
}

AVX2 static void look_up_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]) {
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE);
    __m256i part[8];
    size_t i = 0;
    for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
    for (; i + 32 <= n; i += 32) {
        const __m256i byte = load32(src + i);
        const __m256i entry = look_up_any(_mm256_and_si256(byte, magnitude), part);
        store32(dst + i, _mm256_or_si256(_mm256_andnot_si256(magnitude, byte), entry));
    }
    fp8_requantizer_portable.look_up(src + i, dst + i, n - i, table);
}

const fp8_requantizer fp8_requantizer_avx2 = {max_avx2, measure_avx2, look_up_avx2};
#endif
