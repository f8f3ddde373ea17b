/* The same as requantize_portable.c, bit for bit: eight sums, each of every eighth code. */
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include "requantize_avx2.h"

AVX2 static uint8_t max_avx2(const uint8_t *src, size_t n) {
    __m256i max = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 32) max = _mm256_max_epu8(max, magnitudes(load_some(src + i, n - i)));
    return max_byte(max);
}

/* Of eight vectors eight bytes: what `of` makes of the 32 of each. */
#define HALVES(of, a, b, bits) of(_mm256_unpacklo_epi##bits(a, b), _mm256_unpackhi_epi##bits(a, b))
#define ACROSS(of, v)                                                            \
    for (int i = 0; i < 8; i += 2) v[i] = HALVES(of, v[i], v[i + 1], 8);         \
    for (int i = 0; i < 8; i += 4) v[i] = HALVES(of, v[i], v[i + 2], 16);        \
    v[0] = HALVES(of, v[0], v[4], 32);                                           \
    v[0] = of(v[0], _mm256_permute4x64_epi64(v[0], 0x4e));                       \
    v[0] = of(v[0], _mm256_shuffle_epi32(v[0], 0x4e))

/* The tops and the leasts of up to eight whole runs; returns the largest value, in one of four. */
AVX2 FP8_INLINE __m256d scan_eight(const uint8_t *src, const fp8_band *band, size_t block, const size_t count) {
    __m256i top[8], least[8];
    for (size_t k = 0; k < 8; k++) {
        const uint8_t *const run = src + (block + k) * band->width;
        top[k] = _mm256_setzero_si256();
        least[k] = _mm256_set1_epi8(-1);
        for (size_t i = 0; k < count && i < band->width; i += 32) {
            const __m256i code = _mm256_and_si256(load32(run + i), _mm256_set1_epi8(FP8_MAGNITUDE));
            top[k] = _mm256_max_epu8(top[k], code);
            least[k] = _mm256_min_epu8(least[k], _mm256_sub_epi8(code, _mm256_set1_epi8(1))); /* 0 is the largest */
        }
    }
    ACROSS(_mm256_max_epu8, top);
    ACROSS(_mm256_min_epu8, least);
    _mm_storel_epi64((__m128i *)(void *)(band->top + block), _mm256_castsi256_si128(top[0]));
    _mm_storel_epi64((__m128i *)(void *)(band->least + block),
                     _mm256_castsi256_si128(_mm256_add_epi8(least[0], _mm256_set1_epi8(1))));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(top[0], _mm256_set1_epi8(FP8_NAN))))
        for (size_t k = block; k < block + count; k++)
            if (band->top[k] == FP8_NAN) {
                band->top[k] = max_avx2(src + k * band->width, band->width);
                band->least[k] = 0;
            }
    const __m128i codes = _mm_loadl_epi64((const __m128i *)(const void *)(band->top + block));
    const __m256 bits = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(codes), 20));
    const __m256 value = _mm256_mul_ps(bits, _mm256_set1_ps(0x1p120f));
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
    return _mm256_max_pd(_mm256_mul_pd(low, _mm256_loadu_pd(band->scales + block)),
                         _mm256_mul_pd(high, _mm256_loadu_pd(band->scales + block + 4)));
}

AVX2 static double scan_avx2(const uint8_t *src, const fp8_band *band) {
    const size_t whole = band->columns / band->width;
    __m256d most = _mm256_setzero_pd();
    size_t block = 0;
    if (band->width % 32) return fp8_scan(max_avx2, src, band);
    for (; block + 8 <= whole; block += 8) most = _mm256_max_pd(most, scan_eight(src, band, block, 8));
    if (block < whole) most = _mm256_max_pd(most, scan_eight(src, band, block, whole - block));
    double four[4], largest = 0;
    _mm256_storeu_pd(four, most);
    for (int i = 0; i < 4; i++) largest = four[i] > largest ? four[i] : largest;
    if (whole == band->across) return largest;
    band->top[whole] = max_avx2(src + whole * band->width, fp8_length(band, whole));
    band->least[whole] = 0;
    const double value = fp8_value(band->top[whole]) * band->scales[whole];
    return value > largest ? value : largest;
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

AVX2 uint64_t fp8_steps_avx2(double ratio, int32_t *exponent) {
    uint64_t bits;
    memcpy(&bits, &ratio, sizeof bits);
    *exponent = (int32_t)(bits >> 52) - 1023;
    bits = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1023 << 52; /* in [1, 2) */
    const __m256d times = _mm256_castsi256_pd(_mm256_set1_epi64x((int64_t)bits));
    const __m256i even = rounded_codes(_mm256_setr_pd(1, 1.25, 1.5, 1.75), times);
    const __m256i odd = rounded_codes(_mm256_setr_pd(1.125, 1.375, 1.625, 1.875), times);
    const __m256i all = _mm256_or_si256(even, _mm256_slli_epi64(odd, 32)); /* of m = 0 to 7, 32 bits each */
    const __m256i narrow = _mm256_packs_epi16(_mm256_packs_epi32(all, all), all);
    const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
    return (uint64_t)_mm_cvtsi128_si64(_mm_sub_epi8(eight, _mm_set1_epi64x(0x0706050403020100)));
}

/* 32 codes a step further each. By the code less one, so that 0, of which the shuffle makes 0, stays 0. */
AVX2 FP8_INLINE __m256i stepped(__m256i byte, __m256i steps) {
    const __m256i code = _mm256_and_si256(byte, _mm256_set1_epi8(FP8_MAGNITUDE));
    return _mm256_add_epi8(byte, _mm256_shuffle_epi8(steps, _mm256_sub_epi8(code, _mm256_set1_epi8(1))));
}

/* A run some of whose results, of codes below `first`, are not normal numbers. */
AVX2 static void step_some(const uint8_t *src, uint8_t *dst, size_t n, __m256i steps, int32_t first, double ratio) {
    const __m256i bound = _mm256_set1_epi8((char)first);
    for (size_t i = 0; i < n; i += 32) {
        const __m256i byte = load32(src + i), code = _mm256_and_si256(byte, _mm256_set1_epi8(FP8_MAGNITUDE));
        uint32_t small = (uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi8(bound, code));
        uint8_t before[32];
        store32(before, byte);
        store32(dst + i, stepped(byte, steps));
        for (; small; small &= small - 1) {
            const size_t at = (size_t)__builtin_ctz(small);
            const uint8_t magnitude = before[at] & FP8_MAGNITUDE;
            dst[i + at] = (uint8_t)((before[at] & FP8_SIGN) | fp8_nearest(magnitude, ratio));
        }
    }
}

#define LEAST_EXPONENT (-4) /* below, small results are not few */

/* While results are normal numbers, a code and its result are as far apart as eight codes further up. */
AVX2 static void step_avx2(const uint8_t *src, uint8_t *dst, const fp8_band *band, float after, int second) {
    const fp8_known *const known = &band->known;
    const uint8_t *const leasts = band->least;
    const size_t width = band->width, across = band->across;
    int32_t below;
    fp8_steps_avx2((double)after * known->times, &below);
    for (size_t block = 0; block < across; block++, src += width, dst += width) {
        const int32_t least = leasts[block];
        int32_t exponent = known->exponent[block] - below;
        uint64_t add = known->add[block];
        if (!least || !band->left[block]) continue;
        if (!second) add = fp8_steps_avx2(band->scales[block] / (double)after, &exponent);
        if (exponent < LEAST_EXPONENT) continue;
        const int32_t first = exponent < 0 ? 8 - 8 * exponent : 8;
        const __m256i steps = _mm256_add_epi8(_mm256_set1_epi64x((int64_t)(add >> 8 | add << 56)),
                                              _mm256_set1_epi8((char)(8 * exponent)));
        if (least < first)
            step_some(src, dst, width, steps, first, band->scales[block] / (double)after);
        else
            for (size_t i = 0; i < width; i += 32) store32(dst + i, stepped(load32(src + i), steps));
        band->left[block] = 0;
    }
}

const fp8_requantizer fp8_requantizer_avx2 = {.max = max_avx2,
                                              .scan = scan_avx2,
                                              .measure = fp8_measure_avx2,
                                              .look_up = look_up_avx2,
                                              .know = fp8_know_avx2,
                                              .estimate = fp8_estimate_avx2,
                                              .step = step_avx2};
#endif
