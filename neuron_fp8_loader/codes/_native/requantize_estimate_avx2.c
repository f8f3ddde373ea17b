/* Which of two scales suits a row, without looking at each code's rounding.
 *
 * A code is (8 + m) x 2^(e - 10), and while its result is a normal number, the square of its change is that of the code
 * with the same m and e = 7, times 4^(e - 7). So of each run the eight squares are worked out once, and the codes add
 * up what a table has for m, times what another has for e: whole numbers of 16 bits, which one instruction multiplies
 * and adds in pairs. */
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include "requantize_avx2.h"

/* 4^e, 2^14 for the largest exponent of a run; those more than seven below it count for nothing, which is in the
 * doubt. */
static const uint8_t POWER_LOW[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 4, 16, 64};
static const uint8_t POWER_HIGH[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 4, 16, 64};
#define LARGEST_POWER 14

/* The largest whole number for a square: times 2^14, times the 16 codes that a lane adds up, it is less than 2^31. */
#define LARGEST_SQUARE 8191
#define AT_ONCE 128 /* codes until the whole numbers are taken out */
#define SUMMED 4096 /* codes until the floats are */
#define FEW 128     /* codes with results below the normal numbers, in a run */

/* 2^exponent, a normal number. */
FP8_INLINE float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

AVX2 FP8_INLINE double sum_of(__m256 v) {
    const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* The squares of the changes of the eight mantissas under a ratio, as whole numbers: their low and high bytes, twice. */
typedef struct {
    __m256i low, high;
} squares;

AVX2 FP8_INLINE squares squares_under(float fraction, float times) {
    const __m256 value = _mm256_setr_ps(1, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f);
    const __m256 change = rounding(_mm256_mul_ps(value, _mm256_set1_ps(fraction)));
    const __m256 square = _mm256_mul_ps(_mm256_mul_ps(change, change), _mm256_set1_ps(times));
    /* in each half the low bytes of four, then the high ones */
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_cvtps_epi32(square), _mm256_set1_epi64x(0x0d0905010c080400));
    return (squares){_mm256_permutevar8x32_epi32(bytes, _mm256_set1_epi64x((int64_t)4 << 32)),
                     _mm256_permutevar8x32_epi32(bytes, _mm256_set1_epi64x((int64_t)5 << 32 | 1))};
}

/* The rows of a block row have the mantissa of the second scale in common, and so the squares. */
AVX2 FP8_INLINE squares squares_known(float fraction, float times, fp8_squares *known) {
    if (known->fraction != fraction) {
        const squares made = squares_under(fraction, times);
        _mm_storeu_si128((__m128i *)(void *)known->low, _mm256_castsi256_si128(made.low));
        _mm_storeu_si128((__m128i *)(void *)known->high, _mm256_castsi256_si128(made.high));
        known->fraction = fraction;
    }
    return (squares){twice(known->low), twice(known->high)};
}

typedef struct {
    __m256 signal, noise[FP8_CANDIDATES]; /* in the candidates' units */
} lanes;

/* Codes whose results are not normal numbers, measured; n is a multiple of 8, the last ones 0. */
AVX2 static void add_small(const uint8_t *small, size_t n, const float ratio[FP8_CANDIDATES], lanes *sums) {
    for (size_t i = 0; i < n; i += 8) {
        const __m256 value = eight_values(small + i);
        const __m256 scaled = _mm256_mul_ps(value, _mm256_set1_ps(ratio[0]));
        sums->signal = _mm256_add_ps(sums->signal, _mm256_mul_ps(scaled, scaled));
        for (int k = 0; k < FP8_CANDIDATES; k++) {
            const __m256 change = rounding(_mm256_mul_ps(value, _mm256_set1_ps(ratio[k])));
            sums->noise[k] = _mm256_add_ps(sums->noise[k], _mm256_mul_ps(change, change));
        }
    }
}

/* To sums of whole numbers, those of 32 codes: an entry of a table times a power. */
AVX2 FP8_INLINE __m256i weigh(__m256i sum, __m256i low, __m256i high, __m256i first, __m256i second) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, high), first));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, high), second));
}

AVX2 FP8_INLINE __m256 scaled(__m256 sum, __m256i whole, float unit) {
    return _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(unit)));
}

/* What is known of the run of a block before its codes are looked at. */
typedef struct {
    float ratio[4], fraction[4]; /* of the two candidates; the others are not used */
    float times[4];              /* what makes their squares whole numbers */
    float unit[4];               /* what the sums of whole numbers are worth: noise, and the signal */
    int first;                   /* the first code whose results are normal numbers */
    int top;                     /* the exponent of the largest code; less than 0 if there is none */
} terms;

/* As fp8_ratio, of both candidates. */
AVX2 FP8_INLINE __m128 ratios(double scale, __m128d candidate, int exact[FP8_CANDIDATES]) {
    const __m128d ratio = _mm_div_pd(_mm_set1_pd(scale), candidate);
    const __m128d large = _mm_cmpge_pd(ratio, _mm_set1_pd(0x1p-40));
    const __m128i fraction = _mm_and_si128(_mm_castpd_si128(ratio), _mm_set1_epi64x(((int64_t)1 << 52) - 1));
    const __m128i whole = _mm_cmpeq_epi64(fraction, _mm_setzero_si128());
    const int both = _mm_movemask_pd(_mm_and_pd(large, _mm_castsi128_pd(whole)));
    exact[0] &= both;
    exact[1] &= both >> 1;
    return _mm_cvtpd_ps(_mm_and_pd(ratio, large));
}

/* A power of two that no change is above: 1/8, that of a result a little above 2; less where the ratio is almost a power
 * of two, and changes all mantissas by as much, in proportion. */
AVX2 FP8_INLINE __m128 largest_change(__m128 fraction) {
    const __m128 away = _mm_min_ps(_mm_sub_ps(fraction, _mm_set1_ps(1)), _mm_sub_ps(_mm_set1_ps(2), fraction));
    const __m128 change = _mm_mul_ps(away, _mm_set1_ps(2 * 1.875f)); /* and rounded down, so more than 15/8 of it */
    const __m128 power = _mm_and_ps(change, _mm_castsi128_ps(_mm_set1_epi32(0x7f800000)));
    return _mm_max_ps(_mm_min_ps(power, _mm_set1_ps(0.125f)), _mm_set1_ps(0x1p-24f));
}

/* For runs from `scales` on; returns what is left out, in units of the code 1: see fp8_estimate_avx2. */
AVX2 static double prepare(const double *scales, const uint8_t *runs, size_t n, size_t width,
                           const float candidate[FP8_CANDIDATES], terms *term, fp8_weighed *found) {
    const __m128d below = _mm_setr_pd((double)candidate[0], (double)candidate[1]);
    double left_out = 0;
    for (size_t i = 0; i < n; i++) {
        term[i].top = -1;
        if (!runs[i]) continue;
        const int top = runs[i] >> 3;
        const float power = power_of_two(2 * (top - 7) - LARGEST_POWER);
        const __m128 ratio = ratios(scales[i], below, found->exact);
        /* a ratio without its fraction, if it is not far too small for add_run; and its fraction */
        const __m128 bounded = _mm_max_ps(ratio, _mm_set1_ps(0x1p-16f));
        const __m128 whole = _mm_and_ps(bounded, _mm_castsi128_ps(_mm_set1_epi32(0x7f800000)));
        const __m128 fraction = _mm_div_ps(bounded, whole), largest = largest_change(fraction);
        const __m128 unit = _mm_mul_ps(_mm_mul_ps(whole, largest), _mm_mul_ps(whole, largest));
        const __m128 times = _mm_div_ps(_mm_set1_ps(LARGEST_SQUARE), _mm_mul_ps(largest, largest));
        const __m128 least = _mm_min_ss(bounded, _mm_shuffle_ps(bounded, bounded, 1));
        const int exponent = (int)((uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(least)) >> 23) - 127;
        _mm_storeu_ps(term[i].ratio, ratio);
        _mm_storeu_ps(term[i].fraction, fraction);
        _mm_storeu_ps(term[i].times, times);
        _mm_storeu_ps(term[i].unit, _mm_mul_ps(unit, _mm_set1_ps(power * (1.0f / LARGEST_SQUARE))));
        term[i].unit[2] = term[i].ratio[0] * term[i].ratio[0] * (power * (1.0f / 64));
        term[i].first = exponent > 0 ? 8 : 8 * (1 - exponent);
        term[i].top = top;
        left_out += scales[i] * scales[i] * (double)power;
    }
    return left_out * (double)width;
}

/* A run, 4096 codes of it at most. Returns 0, having added nothing, if too many results are not normal numbers. */
AVX2 FP8_INLINE int add_run(const uint8_t *src, size_t n, const terms *term, fp8_squares *known, lanes *sums) {
    if (term->first > FP8_LARGEST_FIT) return 0;
    const squares first = squares_under(term->fraction[0], term->times[0]);
    const squares second = squares_known(term->fraction[1], term->times[1], known);
    const __m256i not_0 = _mm256_set_epi64x(-1, -256, -1, -256); /* codes that are not taken */
    const __m256i power_low = _mm256_and_si256(twice(POWER_LOW + 15 - term->top), not_0);
    const __m256i power_high = _mm256_and_si256(twice(POWER_HIGH + 15 - term->top), not_0);
    const __m256i signal = _mm256_set1_epi64x((int64_t)0xe1c4a99079645140); /* (8 + m)^2 */
    const __m256i bound = _mm256_set1_epi8((char)term->first), zero = _mm256_setzero_si256();
    lanes run = *sums;
    uint8_t small[FEW + 8];
    size_t n_small = 0;
    for (size_t done = 0; done < n; done += AT_ONCE) {
        const size_t stop = n - done < AT_ONCE ? n : done + AT_ONCE;
        __m256i of_signal = zero, of_first = zero, of_second = zero;
        for (size_t i = done; i < stop; i += 32) {
            const __m256i code = magnitudes(load_some(src + i, n - i)), is_small = _mm256_cmpgt_epi8(bound, code);
            const __m256i taken = _mm256_andnot_si256(is_small, code); /* or 0 */
            const __m256i exponents = _mm256_and_si256(_mm256_srli_epi16(taken, 3), _mm256_set1_epi8(15));
            const __m256i low = _mm256_shuffle_epi8(power_low, exponents);
            const __m256i high = _mm256_shuffle_epi8(power_high, exponents);
            const __m256i before = _mm256_unpacklo_epi8(low, high), after = _mm256_unpackhi_epi8(low, high);
            of_signal = weigh(of_signal, _mm256_shuffle_epi8(signal, taken), zero, before, after);
            of_first = weigh(of_first, _mm256_shuffle_epi8(first.low, taken), _mm256_shuffle_epi8(first.high, taken),
                             before, after);
            of_second = weigh(of_second, _mm256_shuffle_epi8(second.low, taken),
                              _mm256_shuffle_epi8(second.high, taken), before, after);
            uint32_t which = (uint32_t)_mm256_movemask_epi8(is_small);
            if (!which) continue;
            which &= ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, zero));
            for (; which; which &= which - 1) {
                if (n_small == FEW) return 0;
                small[n_small++] = src[i + (size_t)__builtin_ctz(which)] & FP8_MAGNITUDE;
            }
        }
        run.signal = scaled(run.signal, of_signal, term->unit[2]);
        run.noise[0] = scaled(run.noise[0], of_first, term->unit[0]);
        run.noise[1] = scaled(run.noise[1], of_second, term->unit[1]);
    }
    if (n_small) {
        memset(small + n_small, 0, 8);
        lanes with = run; /* whose address keeps it out of the registers */
        add_small(small, n_small, term->ratio, &with);
        run = with;
    }
    *sums = run;
    return 1;
}

AVX2 void fp8_estimate_avx2(const uint8_t *src, size_t columns, size_t width, const double *scales,
                            const uint8_t *runs, const float candidate[FP8_CANDIDATES],
                            fp8_squares known[FP8_KNOWN], fp8_weighed *found) {
    const __m256 none = _mm256_setzero_ps();
    const lanes nothing = {none, {none, none}};
    lanes sums = nothing;
    terms term[FP8_KNOWN];
    double signal = 0, noise[FP8_CANDIDATES] = {0, 0}, left_out = 0;
    size_t since = 0, left = 0;
    *found = (fp8_weighed){0, {0, 0}, {0, 0}, {1, 1}};
    for (size_t block = 0; left < columns; block++) {
        const size_t here = block % FP8_KNOWN, right = columns - left < width ? columns : left + width;
        if (!here) {
            const size_t more = (columns - left) / width + ((columns - left) % width != 0);
            left_out += prepare(scales + block, runs + block, more < FP8_KNOWN ? more : FP8_KNOWN, width, candidate,
                                term, found);
        }
        if (term[here].top < 0) left = right;
        while (left < right) {
            const size_t n = right - left < SUMMED ? right - left : SUMMED;
            if (since + n > SUMMED) {
                signal += sum_of(sums.signal);
                for (int k = 0; k < FP8_CANDIDATES; k++) noise[k] += sum_of(sums.noise[k]);
                sums = nothing;
                since = 0;
            }
            if (!add_run(src + left, n, term + here, known + here, &sums)) {
                double measured[1 + FP8_CANDIDATES] = {0};
                fp8_measure_avx2(src + left, n, term[here].ratio, measured);
                signal += measured[0] * (double)term[here].ratio[0] * (double)term[here].ratio[0];
                for (int k = 0; k < FP8_CANDIDATES; k++) noise[k] += measured[1 + k];
            }
            since += n;
            left += n;
        }
    }
    signal += sum_of(sums.signal);
    found->signal = signal * (double)candidate[0] * (double)candidate[0];
    for (int k = 0; k < FP8_CANDIDATES; k++) {
        found->noise[k] = (noise[k] + sum_of(sums.noise[k])) * (double)candidate[k] * (double)candidate[k];
        /* an entry is off by half of one at most, which is 1/64 / LARGEST_SQUARE or less; a power that is left out is a
         * quarter; and a fraction's square is 1 at least */
        if (!found->exact[k])
            found->doubt[k] = (0.5 / LARGEST_SQUARE * found->signal + 0.25 * left_out) / 64;
    }
}
#endif
