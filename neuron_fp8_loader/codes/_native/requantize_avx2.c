/* The same as the plain C at the end of requantize.c, bit for bit: eight sums, each of every eighth code. */
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include "requantize_avx2.h"

AVX2 static uint8_t max_avx2(const uint8_t *src, size_t n) {
    __m256i max = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 32) max = _mm256_max_epu8(max, magnitudes(load_some(src + i, n - i)));
    return max_byte(max);
}

AVX2 void fp8_measure_avx2(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                           double sums[1 + FP8_CANDIDATES]) {
    __m256 lanes[1 + FP8_CANDIDATES], times[FP8_CANDIDATES];
    for (int k = 0; k <= FP8_CANDIDATES; k++) lanes[k] = _mm256_setzero_ps();
    for (int k = 0; k < FP8_CANDIDATES; k++) times[k] = _mm256_set1_ps(ratio[k]);
    for (size_t i = 0; i < n; i += 32) {
        uint8_t code[32];
        store32(code, magnitudes(load_some(src + i, n - i)));
        for (int part = 0; part < 32; part += 8) {
            const __m256 value = eight_values(code + part);
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
    if (n >= 32)
        for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
    for (; i + 32 <= n; i += 32) {
        const __m256i byte = load32(src + i);
        const __m256i entry = look_up_any(_mm256_and_si256(byte, magnitude), part);
        store32(dst + i, _mm256_or_si256(_mm256_andnot_si256(magnitude, byte), entry));
    }
    fp8_requantizer_portable.look_up(src + i, dst + i, n - i, table);
}

/* Four mantissas times `fraction`, rounded to four bits: 8 times the exponent, plus the new mantissa. */
AVX2 FP8_INLINE __m256i rounded_codes(__m256d value, __m256d fraction) {
    const __m256d x = _mm256_mul_pd(value, fraction); /* in [1, 4) */
    /* a number whose last bit is 1/8, and from 2 up 1/4: adding it rounds to nearest, ties to even */
    const __m256d large = _mm256_blendv_pd(_mm256_set1_pd(0x1p49), _mm256_set1_pd(0x1p50),
                                           _mm256_cmp_pd(x, _mm256_set1_pd(2), _CMP_GE_OQ));
    const __m256i bits = _mm256_castpd_si256(_mm256_sub_pd(_mm256_add_pd(x, large), large));
    return _mm256_srli_epi64(_mm256_sub_epi64(bits, _mm256_castpd_si256(_mm256_set1_pd(1))), 49);
}

AVX2 static void find_steps(uint64_t fraction, fp8_steps *steps) {
    const __m256d times = _mm256_castsi256_pd(_mm256_set1_epi64x((int64_t)fraction));
    const __m256i even = rounded_codes(_mm256_setr_pd(1, 1.25, 1.5, 1.75), times);
    const __m256i odd = rounded_codes(_mm256_setr_pd(1.125, 1.375, 1.625, 1.875), times);
    const __m256i all = _mm256_or_si256(even, _mm256_slli_epi64(odd, 32)); /* of m = 0 to 7, 32 bits each */
    const __m256i narrow = _mm256_packs_epi16(_mm256_packs_epi32(all, all), all);
    const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
    const __m128i steps_up = _mm_sub_epi8(eight, _mm_set1_epi64x(0x0706050403020100));
    _mm_storel_epi64((__m128i *)(void *)steps->add, steps_up);
    steps->fraction = fraction;
}

static int steps_avx2(double ratio, fp8_steps *steps) {
    uint64_t bits;
    memcpy(&bits, &ratio, sizeof bits);
    const uint64_t fraction = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1023 << 52; /* in [1, 2) */
    const int exponent = (int)(bits >> 52) - 1023, normal = 1 - exponent;
    if (normal > FP8_LARGEST_FIT / 8) return 0; /* few results are normal numbers, or none */
    if (steps->fraction != fraction) find_steps(fraction, steps);
    steps->more = (uint8_t)(8 * exponent);
    steps->first = (uint8_t)(normal < 1 ? 8 : 8 * normal);
    return 1;
}

AVX2 static size_t step_avx2(const uint8_t *src, uint8_t *dst, size_t n, const fp8_steps *steps) {
    int64_t eight;
    memcpy(&eight, steps->add, sizeof eight);
    const __m256i add = _mm256_add_epi8(_mm256_set1_epi64x(eight), _mm256_set1_epi8((char)steps->more));
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i bound = _mm256_set1_epi8((char)(steps->first + 1));
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i byte = load32(src + i), code = _mm256_and_si256(byte, _mm256_set1_epi8(FP8_MAGNITUDE));
        /* + 1 makes NaN the least of all */
        if (_mm256_movemask_epi8(_mm256_cmpgt_epi8(bound, _mm256_add_epi8(code, one)))) break;
        store32(dst + i, _mm256_add_epi8(byte, _mm256_shuffle_epi8(add, code)));
    }
    return i;
}

const fp8_requantizer fp8_requantizer_avx2 = {max_avx2,     fp8_measure_avx2, fp8_estimate_avx2,
                                              look_up_avx2, steps_avx2,       step_avx2};
#endif
