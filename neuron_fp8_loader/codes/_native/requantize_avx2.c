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

/* Of the eight mantissas the squares of the changes, for codes whose value is (8 + mantissa) / 8. The ratio is made
 * large first, so that none of the results is below the normal numbers. */
AVX2 FP8_INLINE __m256 squares(__m256 value, float ratio) {
    const __m256 change = rounding(_mm256_mul_ps(value, _mm256_set1_ps(ratio * 0x1p40f)));
    return _mm256_mul_ps(change, change);
}

/* The first code whose result is a normal number. */
static int first_normal(float ratio) {
    uint32_t bits;
    memcpy(&bits, &ratio, sizeof bits);
    const int exponent = 1 - ((int)(bits >> 23) - 127); /* of the code, when the result has the smallest one */
    return 8 * (exponent < 1 ? 1 : exponent > 16 ? 16 : exponent);
}

/* Add, of eight codes, a table's entries by mantissa times a power of four by exponent. */
AVX2 FP8_INLINE void weigh_eight(__m128i codes, const __m256 table[1 + FP8_CANDIDATES],
                                 __m256 lanes[1 + FP8_CANDIDATES]) {
    const __m256i wide = _mm256_cvtepu8_epi32(codes);
    /* twice the exponent, as a float's: 0x80 in the byte makes it large enough to be a normal one */
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0xf8)), 21));
    for (int k = 0; k <= FP8_CANDIDATES; k++)
        lanes[k] = _mm256_add_ps(lanes[k], _mm256_mul_ps(_mm256_permutevar8x32_ps(table[k], wide), power));
}

AVX2 FP8_INLINE __m256 values_of(const uint8_t eight[8]) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)eight));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 20)), _mm256_set1_ps(0x1p120f));
}

AVX2 FP8_INLINE double sum_of(__m256 v) {
    const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

#define FEW 64
#define AT_ONCE 4096 /* codes whose squares are added in single precision */

/* What the sums of weigh_eight stand for. A code's exponent less 7, twice, less what its power is too small: 2^81. The
 * tables make it 2^40 times as much for the signal, which is counted in the first candidate's units, 2^80 for noise. */
#define SIGNAL_UNIT 0x1p41
#define NOISE_UNIT 2

AVX2 static int estimate_avx2(const uint8_t *src, size_t columns, size_t width, const double *scales,
                              const uint8_t *runs, const float candidate[FP8_CANDIDATES], fp8_weighed *found) {
    const __m256 value = _mm256_setr_ps(1, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f);
    const __m256 square = _mm256_mul_ps(value, value);
    __m256 lanes[1 + FP8_CANDIDATES];
    double sums[1 + FP8_CANDIDATES] = {0};
    size_t since = 0;
    *found = (fp8_weighed){0, {0, 0}, {1, 1}};
    for (int k = 0; k <= FP8_CANDIDATES; k++) lanes[k] = _mm256_setzero_ps();
    for (size_t left = 0, block = 0; left < columns; left += width, block++) {
        const size_t n = columns - left < width ? columns - left : width;
        if (!runs[block]) continue;
        if (n > AT_ONCE) return 0;
        const float ratio[FP8_CANDIDATES] = {fp8_ratio(scales[block], candidate[0], &found->exact[0]),
                                             fp8_ratio(scales[block], candidate[1], &found->exact[1])};
        const int first = first_normal(ratio[0] < ratio[1] ? ratio[0] : ratio[1]);
        if (first > FP8_LARGEST_FIT) return 0;
        const float signal = ratio[0] * ratio[0] * 0x1p40f;
        const __m256 table[1 + FP8_CANDIDATES] = {_mm256_mul_ps(square, _mm256_set1_ps(signal)),
                                                  squares(value, ratio[0]), squares(value, ratio[1])};
        const __m256i bound = _mm256_set1_epi8((char)first);
        uint8_t small[FEW + 8]; /* what is to be measured after all */
        size_t n_small = 0;
        for (size_t i = left; i < left + n; i += 32) {
            const __m256i code = finite(load_some(src + i, left + n - i)), is_small = _mm256_cmpgt_epi8(bound, code);
            const __m256i taken = _mm256_andnot_si256(is_small, _mm256_or_si256(code, _mm256_set1_epi8((char)0x80)));
            const __m256i is_zero = _mm256_cmpeq_epi8(code, _mm256_setzero_si256());
            uint32_t which = (uint32_t)_mm256_movemask_epi8(_mm256_andnot_si256(is_zero, is_small));
            for (; which; which &= which - 1) {
                if (n_small == FEW) return 0;
                small[n_small++] = src[i + (size_t)__builtin_ctz(which)] & FP8_MAGNITUDE;
            }
            const __m128i low = _mm256_castsi256_si128(taken), high = _mm256_extracti128_si256(taken, 1);
            weigh_eight(low, table, lanes);
            weigh_eight(_mm_srli_si128(low, 8), table, lanes);
            weigh_eight(high, table, lanes);
            weigh_eight(_mm_srli_si128(high, 8), table, lanes);
        }
        if (n_small) memset(small + n_small, 0, 8);
        for (size_t i = 0; i < n_small; i += 8) {
            const __m256 v = values_of(small + i), unit = _mm256_set1_ps(signal * 0x1p-81f);
            lanes[0] = _mm256_add_ps(lanes[0], _mm256_mul_ps(_mm256_mul_ps(v, v), unit));
            for (int k = 0; k < FP8_CANDIDATES; k++) {
                const __m256 change = rounding(_mm256_mul_ps(v, _mm256_set1_ps(ratio[k])));
                const __m256 half = _mm256_mul_ps(_mm256_mul_ps(change, change), _mm256_set1_ps(1.0f / NOISE_UNIT));
                lanes[1 + k] = _mm256_add_ps(lanes[1 + k], half);
            }
        }
        since += n;
        if (since + width > AT_ONCE) {
            for (int k = 0; k <= FP8_CANDIDATES; k++) sums[k] += sum_of(lanes[k]), lanes[k] = _mm256_setzero_ps();
            since = 0;
        }
    }
    for (int k = 0; k <= FP8_CANDIDATES; k++) sums[k] += sum_of(lanes[k]); /* where zeros end the row */
    found->signal = sums[0] * SIGNAL_UNIT * (double)candidate[0] * (double)candidate[0];
    for (int k = 0; k < FP8_CANDIDATES; k++)
        found->noise[k] = sums[1 + k] * NOISE_UNIT * (double)candidate[k] * (double)candidate[k];
    return 1;
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

const fp8_requantizer fp8_requantizer_avx2 = {max_avx2, measure_avx2, estimate_avx2, look_up_avx2};
#endif
