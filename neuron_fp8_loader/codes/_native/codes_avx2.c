/* AVX2, 32 codes at a time. Compiled for AVX2 by attribute, called only where the CPU has it. */
#include "codes.h"

#ifdef FP8_HAVE_AVX2
#include "avx2.h"

/* Byte-wide counters hold 255; flush them before they wrap. */
#define BLOCK ((size_t)255 * 32)

/* From 0x10 up `half` is "minus 8" (one exponent step), so one shuffle serves the 16 codes
 * below; any other table takes eight. */
static int is_minus_eight_above_16(const uint8_t table[FP8_CODES]) {
    for (int m = 16; m < FP8_NAN; m++)
        if (table[m] != m - 8) return 0;
    return table[FP8_NAN] == FP8_NAN;
}

AVX2 static inline uint64_t sum_bytes(__m256i v) {
    const __m256i s = _mm256_sad_epu8(v, _mm256_setzero_si256());
    return (uint64_t)_mm256_extract_epi64(s, 0) + (uint64_t)_mm256_extract_epi64(s, 1) +
           (uint64_t)_mm256_extract_epi64(s, 2) + (uint64_t)_mm256_extract_epi64(s, 3);
}

AVX2 static inline __m256i look_up_half(__m256i code, __m256i low) {
    const __m256i is_low = _mm256_cmpgt_epi8(_mm256_set1_epi8(16), code);
    const __m256i is_nan = _mm256_cmpeq_epi8(code, _mm256_set1_epi8(FP8_NAN));
    __m256i entry = _mm256_sub_epi8(code, _mm256_set1_epi8(8));
    entry = _mm256_blendv_epi8(entry, _mm256_shuffle_epi8(low, code), is_low);
    return _mm256_blendv_epi8(entry, code, is_nan);
}

/* All whole steps of 32; `half` is a constant where this is called, and part has one vector then, otherwise eight. */
AVX2 FP8_INLINE size_t translate(const uint8_t *src, uint8_t *dst, size_t n, const __m256i *part, const int half,
                                 fp8_counts *counts) {
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE), nan = _mm256_set1_epi8(FP8_NAN);
    const __m256i sign = _mm256_set1_epi8((char)FP8_SIGN), fits = _mm256_set1_epi8(FP8_LARGEST_FIT);
    __m256i max = _mm256_setzero_si256();
    uint64_t over = 0, lossy = 0, nans = 0;
    size_t i = 0;
    const size_t whole = n & ~(size_t)31;
    while (i < whole) {
        const size_t stop = whole - i < BLOCK ? whole : i + BLOCK;
        __m256i n_over = _mm256_setzero_si256(), n_lossy = n_over, n_nan = n_over;
        for (; i < stop; i += 32) {
            const __m256i byte = load32(src + i), code = _mm256_and_si256(byte, magnitude);
            const __m256i entry = half ? look_up_half(code, part[0]) : look_up_any(code, part);
            max = _mm256_max_epu8(max, code);
            n_over = _mm256_sub_epi8(n_over, _mm256_cmpgt_epi8(code, fits));
            n_nan = _mm256_sub_epi8(n_nan, _mm256_cmpeq_epi8(code, nan));
            n_lossy = _mm256_sub_epi8(n_lossy, _mm256_cmpgt_epi8(_mm256_setzero_si256(), entry));
            if (dst)
                store32(dst + i, _mm256_or_si256(_mm256_and_si256(byte, sign), _mm256_and_si256(entry, magnitude)));
        }
        over += sum_bytes(n_over);
        lossy += sum_bytes(n_lossy);
        nans += sum_bytes(n_nan);
    }
    const uint8_t largest = max_byte(max);
    if (largest > counts->max) counts->max = largest;
    counts->above += over - nans;
    counts->lossy += lossy;
    counts->nan += nans;
    return whole;
}

/* Whole steps of 128, where all codes that lose a bit are below 16, counted: of most no code is that small. */
AVX2 static size_t count(const uint8_t *src, size_t n, const uint8_t table[FP8_CODES], fp8_counts *counts) {
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE), fits = _mm256_set1_epi8(FP8_LARGEST_FIT);
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1), low = twice(table);
    const size_t whole = n & ~(size_t)127;
    __m256i max = zero;
    fp8_counts seen = {0, 0, 0, 0};
    for (size_t i = 0; i < whole;) {
        const size_t stop = whole - i < 63 * 128 ? whole : i + 63 * 128; /* before a byte's count of 255 wraps */
        __m256i n_over = zero, n_lossy = zero;
        for (; i < stop; i += 128) {
            __m256i least = _mm256_set1_epi8(-1), code[4];
            for (int k = 0; k < 4; k++) {
                code[k] = _mm256_and_si256(load32(src + i + 32 * k), magnitude);
                max = _mm256_max_epu8(max, code[k]);
                least = _mm256_min_epu8(least, _mm256_sub_epi8(code[k], one)); /* 0, which loses nothing, is last */
                n_over = _mm256_sub_epi8(n_over, _mm256_cmpgt_epi8(code[k], fits));
            }
            if (!_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(least, _mm256_set1_epi8(14)), least))) continue;
            for (int k = 0; k < 4; k++) {
                const __m256i is_low = _mm256_cmpgt_epi8(_mm256_set1_epi8(16), code[k]);
                const __m256i entry = _mm256_and_si256(_mm256_shuffle_epi8(low, code[k]), is_low);
                n_lossy = _mm256_sub_epi8(n_lossy, _mm256_cmpgt_epi8(zero, entry));
            }
        }
        seen.above += sum_bytes(n_over);
        seen.lossy += sum_bytes(n_lossy);
    }
    seen.max = max_byte(max);
    if (seen.max == FP8_NAN) /* which was counted as above */
        for (size_t i = 0; i < whole; i += 32) {
            const __m256i code = _mm256_and_si256(load32(src + i), magnitude);
            const int nan = _mm256_movemask_epi8(_mm256_cmpeq_epi8(code, _mm256_set1_epi8(FP8_NAN)));
            seen.nan += (uint64_t)__builtin_popcount((unsigned)nan);
        }
    if (seen.max > counts->max) counts->max = seen.max;
    counts->above += seen.above - seen.nan;
    counts->lossy += seen.lossy;
    counts->nan += seen.nan;
    return whole;
}

static int loses_below_16_only(const uint8_t table[FP8_CODES]) {
    int lost = table[0];
    for (int m = 16; m < FP8_CODES; m++) lost |= table[m];
    return !(lost & FP8_SIGN);
}

AVX2 void fp8_translate_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                             fp8_counts *counts) {
    size_t done = !dst && n >= 128 && loses_below_16_only(table) ? count(src, n, table, counts) : 0;
    if (n - done >= 32) {
        __m256i part[8];
        for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
        src += done, n -= done;
        done = is_minus_eight_above_16(table) ? translate(src, dst, n, part, 1, counts)
                                              : translate(src, dst, n, part, 0, counts);
    }
    fp8_translate_portable(src + done, dst ? dst + done : NULL, n - done, table, counts);
}
#endif
