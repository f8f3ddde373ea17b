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
#define ITS_ROOT 90.504f
#define AT_ONCE 128 /* codes until the whole numbers are taken out */
#define SUMMED 4096 /* codes until the floats are */
#define FEW 32      /* codes of a run with results below the normal numbers; with more, it is measured */
#define CHUNK 64    /* runs that are prepared for at a time */

AVX2 FP8_INLINE double sum_of(__m256 v) {
    const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

AVX2 FP8_INLINE __m256 power_of_two_in(__m256 x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
}

AVX2 FP8_INLINE __m256 fraction_of(__m256 x) { /* from 1 up to 2 */
    const __m256 bits = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x007fffff)));
    return _mm256_or_ps(bits, _mm256_set1_ps(1));
}

/* Powers of two that no change is above: 1/8, that of a result a little above 2; less where the ratio is almost a power
 * of two, and changes all mantissas by as much, in proportion. */
AVX2 FP8_INLINE __m256 largest_change(__m256 fraction) {
    const __m256 above = _mm256_sub_ps(fraction, _mm256_set1_ps(1)), below = _mm256_sub_ps(_mm256_set1_ps(2), fraction);
    /* and rounded down, so more than 15/8 of it */
    const __m256 change = _mm256_mul_ps(_mm256_min_ps(above, below), _mm256_set1_ps(2 * 1.875f));
    return _mm256_max_ps(_mm256_min_ps(power_of_two_in(change), _mm256_set1_ps(0.125f)), _mm256_set1_ps(0x1p-24f));
}

/* What makes changes roots of whole numbers. */
AVX2 FP8_INLINE __m256 root_for(__m256 largest) {
    const __m256i one_over = _mm256_sub_epi32(_mm256_set1_epi32(0x7f000000), _mm256_castps_si256(largest));
    return _mm256_mul_ps(_mm256_castsi256_ps(one_over), _mm256_set1_ps(ITS_ROOT));
}

/* The squares of the changes of the eight mantissas under a ratio, as whole numbers of 16 bits: the low bytes of all,
 * then the high ones. */
AVX2 FP8_INLINE void store_squares(void *at, __m256 fraction, __m256 root) {
    const __m256 value = _mm256_setr_ps(1, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f);
    const __m256 x = _mm256_mul_ps(value, fraction), large = _mm256_mul_ps(power_of_two_in(x), _mm256_set1_ps(0x1p20f));
    const __m256 change = _mm256_mul_ps(_mm256_sub_ps(x, _mm256_sub_ps(_mm256_add_ps(x, large), large)), root);
    /* in each half the low bytes of four, then the high ones */
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_cvtps_epi32(_mm256_mul_ps(change, change)),
                                              _mm256_set1_epi64x(0x0d0905010c080400));
    const __m256i sorted = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128((__m128i *)at, _mm256_castsi256_si128(sorted));
}

AVX2 void fp8_know_avx2(fp8_band *band) {
    fp8_known *const k = &band->known;
    double largest = 0, least = 0x1p127;
    for (size_t i = 0; i < band->across; i++) {
        const double scale = band->scales[i];
        largest = scale > largest ? scale : largest;
        least = scale > 0 && scale < least ? scale : least;
    }
    k->there = largest > 0x1p-900 && least >= largest * 0x1p-60;
    if (!k->there) return;
    uint64_t bits;
    memcpy(&bits, &largest, sizeof bits);
    bits = (2046 - (bits >> 52)) << 52;
    memcpy(&k->times, &bits, sizeof bits);
    for (size_t i = 0; i < band->across; i++) {
        const double scale = band->scales[i] * k->times, ratio = scale / band->mantissa;
        const __m256 all = _mm256_set1_ps((float)ratio), fraction = fraction_of(all);
        const __m256 largest_one = largest_change(fraction);
        k->scale[i] = (float)scale;
        k->ratio[i] = (float)ratio;
        k->worth[i] = _mm256_cvtss_f32(_mm256_mul_ps(power_of_two_in(all), largest_one));
        store_squares(k->squares + 2 * i, fraction, root_for(largest_one));
        k->add[i] = fp8_steps_avx2(ratio, &k->exponent[i]);
    }
}

/* What is known of some runs of a row before their codes are looked at. */
typedef struct {
    float ratio[FP8_CANDIDATES][CHUNK];
    uint8_t squares[CHUNK][16]; /* of the first candidate, as in fp8_known */
    float unit[3][CHUNK];       /* what the sums of whole numbers are worth: noise, and the signal */
    int32_t first[CHUNK];       /* the first code whose results are normal numbers */
    int32_t sure[CHUNK];        /* all codes but 0 are, none is NaN, and 0 counts for nothing by itself */
} terms;

/* For n runs from `from` on, at most CHUNK, and some zeros after the last; `times`: the first candidate's ratio is
 * known.scale by it, the second's known.ratio. Returns what is left out, in units of the code 1. */
AVX2 static __m256 prepare(const fp8_band *band, size_t from, size_t n, const float times[FP8_CANDIDATES], terms *t) {
    const __m256i seven = _mm256_set1_epi32(7), eight = _mm256_set1_epi32(8);
    __m256 left_out = _mm256_setzero_ps();
    _Alignas(32) float fractions[8], roots[8];
    for (size_t i = 0; i < n; i += 8) {
        const size_t at = from + i;
        const __m256i top = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(band->top + at)));
        const __m256i least = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(band->least + at)));
        const __m256i e = _mm256_srli_epi32(top, 3);
        const __m256i power_bits = _mm256_add_epi32(_mm256_add_epi32(e, e), _mm256_set1_epi32(127 - 14 - LARGEST_POWER));
        const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(power_bits, 23));
        const __m256 worth = _mm256_mul_ps(power, _mm256_set1_ps(1.0f / LARGEST_SQUARE));
        const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(band->known.scale + at), _mm256_set1_ps(times[0]));
        const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(band->known.ratio + at), _mm256_set1_ps(times[1]));
        const __m256 bounded = _mm256_max_ps(first, _mm256_set1_ps(0x1p-16f)); /* or its square might be none */
        const __m256 fraction = fraction_of(bounded), largest = largest_change(fraction);
        const __m256 of_first = _mm256_mul_ps(power_of_two_in(bounded), largest);
        const __m256 of_second = _mm256_mul_ps(_mm256_loadu_ps(band->known.worth + at), _mm256_set1_ps(times[1]));
        const __m256 of_signal = _mm256_mul_ps(_mm256_mul_ps(first, first), power);
        const __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(_mm256_min_ps(first, second)), 23);
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(128), biased), 3);
        const __m256i start = _mm256_min_epi32(_mm256_max_epi32(eight, normal), _mm256_set1_epi32(FP8_NAN));
        const __m256i lost = _mm256_cmpgt_epi32(e, _mm256_add_epi32(_mm256_srli_epi32(least, 3), seven));
        _mm256_store_ps(fractions, fraction);
        _mm256_store_ps(roots, root_for(largest));
        for (size_t k = 0; k < 8; k++)
            store_squares(t->squares[i + k], _mm256_broadcast_ss(fractions + k), _mm256_broadcast_ss(roots + k));
        _mm256_storeu_ps(t->unit[0] + i, _mm256_mul_ps(_mm256_mul_ps(of_first, of_first), worth));
        _mm256_storeu_ps(t->unit[1] + i, _mm256_mul_ps(_mm256_mul_ps(of_second, of_second), worth));
        _mm256_storeu_ps(t->unit[2] + i, _mm256_mul_ps(of_signal, _mm256_set1_ps(1.0f / 64)));
        _mm256_storeu_si256((__m256i *)(void *)(t->first + i), start);
        _mm256_storeu_ps(t->ratio[0] + i, first);
        _mm256_storeu_ps(t->ratio[1] + i, second);
        const __m256i sure = _mm256_andnot_si256(_mm256_cmpgt_epi32(start, least), _mm256_cmpgt_epi32(e, seven));
        _mm256_storeu_si256((__m256i *)(void *)(t->sure + i), sure);
        left_out = _mm256_add_ps(left_out, _mm256_and_ps(_mm256_castsi256_ps(lost), of_signal));
    }
    return left_out;
}

typedef struct {
    __m256 signal, noise[FP8_CANDIDATES]; /* in the candidates' units */
} lanes;

/* Tables and sums of a run. */
typedef struct {
    __m256i power_low, power_high; /* bytes of the powers, by the exponent */
    __m256i of[3];                 /* squares, by m: of the changes, and (8 + m)^2 */
    __m256i sum[3];
} weighing;

AVX2 FP8_INLINE weighing begin(const fp8_band *band, size_t block, const terms *t) {
    const size_t top = band->top[block] >> 3;
    return (weighing){
        twice(POWER_LOW + 15 - top),
        twice(POWER_HIGH + 15 - top),
        {twice(t->squares[block % CHUNK]),
         twice((const uint8_t *)(band->known.squares + 2 * block)),
         _mm256_set_epi64x(0, (int64_t)0xe1c4a99079645140, 0, (int64_t)0xe1c4a99079645140)},
        {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()},
    };
}

/* To the sums those of 32 codes: entries of the tables times powers. */
AVX2 FP8_INLINE void weigh(weighing *w, __m256i code) {
    const __m256i exponent = _mm256_srli_epi16(_mm256_and_si256(code, _mm256_set1_epi8(0x78)), 3);
    const __m256i low = _mm256_shuffle_epi8(w->power_low, exponent), high = _mm256_shuffle_epi8(w->power_high, exponent);
    const __m256i before = _mm256_unpacklo_epi8(low, high), after = _mm256_unpackhi_epi8(low, high);
    /* where the two bytes of an entry are, side by side */
    const __m256i first = _mm256_and_si256(code, _mm256_set1_epi8(7));
    const __m256i other = _mm256_or_si256(first, _mm256_set1_epi8(8));
    const __m256i left = _mm256_unpacklo_epi8(first, other), right = _mm256_unpackhi_epi8(first, other);
    for (int k = 0; k < 3; k++) {
        const __m256i one = _mm256_madd_epi16(_mm256_shuffle_epi8(w->of[k], left), before);
        const __m256i two = _mm256_madd_epi16(_mm256_shuffle_epi8(w->of[k], right), after);
        w->sum[k] = _mm256_add_epi32(w->sum[k], _mm256_add_epi32(one, two));
    }
}

AVX2 FP8_INLINE void add_weighed(const weighing *w, const terms *t, size_t here, lanes *sums) {
    __m256 part[3];
    for (int k = 0; k < 3; k++)
        part[k] = _mm256_mul_ps(_mm256_cvtepi32_ps(w->sum[k]), _mm256_broadcast_ss(t->unit[k] + here));
    sums->noise[0] = _mm256_add_ps(sums->noise[0], part[0]);
    sums->noise[1] = _mm256_add_ps(sums->noise[1], part[1]);
    sums->signal = _mm256_add_ps(sums->signal, part[2]);
}

/* So many runs that are sure, n codes of each: a multiple of 32, and of all together SUMMED at most. */
AVX2 static lanes add_sure(const uint8_t *src, size_t n, const fp8_band *band, size_t block, size_t runs, const terms *t,
                           lanes sums) {
    for (const size_t end = block + runs; block < end; block++) {
        weighing w = begin(band, block, t);
        for (size_t done = 0; done < n; done += AT_ONCE) {
            const uint8_t *const stop = src + (n - done < AT_ONCE ? n - done : AT_ONCE);
            for (; src < stop; src += 32) weigh(&w, load32(src));
            add_weighed(&w, t, block % CHUNK, &sums);
            for (int k = 0; k < 3; k++) w.sum[k] = _mm256_setzero_si256();
        }
    }
    return sums;
}

/* Codes whose results are not normal numbers, measured; n of them, then 7 zeros. */
AVX2 static lanes add_small(const uint8_t *small, size_t n, const float ratio[FP8_CANDIDATES], lanes sums) {
    for (size_t i = 0; i < n; i += 8) {
        const __m256 value = eight_values(small + i), x = _mm256_mul_ps(value, _mm256_set1_ps(ratio[0]));
        sums.signal = _mm256_add_ps(sums.signal, _mm256_mul_ps(x, x));
        for (int k = 0; k < FP8_CANDIDATES; k++) {
            const __m256 change = rounding(_mm256_mul_ps(value, _mm256_set1_ps(ratio[k])));
            sums.noise[k] = _mm256_add_ps(sums.noise[k], _mm256_mul_ps(change, change));
        }
    }
    return sums;
}

/* Any other run. */
AVX2 static lanes add_unsure(const uint8_t *src, size_t n, const fp8_band *band, size_t block, const terms *t,
                             const lanes before, double measured[1 + FP8_CANDIDATES]) {
    const size_t here = block % CHUNK;
    const float ratio[FP8_CANDIDATES] = {t->ratio[0][here], t->ratio[1][here]};
    const __m256i bound = _mm256_set1_epi8((char)t->first[here]), zero = _mm256_setzero_si256();
    const __m256i not_0 = _mm256_set_epi64x(-1, -256, -1, -256); /* codes that are not taken */
    weighing w = begin(band, block, t);
    lanes sums = before;
    uint8_t small[FEW + 32 + 7];
    size_t n_small = 0;
    w.power_low = _mm256_and_si256(w.power_low, not_0);
    w.power_high = _mm256_and_si256(w.power_high, not_0);
    for (size_t done = 0; done < n && n_small <= FEW; done += AT_ONCE) {
        const size_t stop = n - done < AT_ONCE ? n : done + AT_ONCE;
        for (size_t i = done; i < stop && n_small <= FEW; i += 32) {
            const __m256i code = magnitudes(load_some(src + i, n - i)), is_small = _mm256_cmpgt_epi8(bound, code);
            const __m256i counts = _mm256_andnot_si256(_mm256_cmpeq_epi8(code, zero), is_small);
            uint32_t which = (uint32_t)_mm256_movemask_epi8(counts);
            weigh(&w, _mm256_andnot_si256(is_small, code)); /* or 0 */
            for (; which; which &= which - 1) small[n_small++] = src[i + (size_t)__builtin_ctz(which)] & FP8_MAGNITUDE;
        }
        add_weighed(&w, t, here, &sums);
        for (int k = 0; k < 3; k++) w.sum[k] = zero;
    }
    if (n_small <= FEW) {
        memset(small + n_small, 0, 7);
        return add_small(small, n_small, ratio, sums);
    }
    double part[1 + FP8_CANDIDATES] = {0, measured[1], measured[2]};
    fp8_measure_avx2(src, n, ratio, part);
    measured[0] += part[0] * (double)ratio[0] * (double)ratio[0];
    for (int k = 1; k <= FP8_CANDIDATES; k++) measured[k] = part[k];
    return before;
}

AVX2 void fp8_estimate_avx2(const uint8_t *src, const fp8_band *band, const float candidate[FP8_CANDIDATES],
                            fp8_weighed *found) {
    const __m256 none = _mm256_setzero_ps();
    const lanes nothing = {none, {none, none}};
    const double mantissa[FP8_CANDIDATES] = {1, band->mantissa};
    float times[FP8_CANDIDATES];
    lanes sums = nothing;
    terms term;
    double total[1 + FP8_CANDIDATES] = {0}, left_out = 0; /* in units of the candidates; the first is the signal's */
    size_t since = 0;
    for (int k = 0; k < FP8_CANDIDATES; k++)
        times[k] = (float)(mantissa[k] / ((double)candidate[k] * band->known.times));
    for (size_t block = 0, end = 0; block < band->across;) {
        if (block == end) {
            end = band->across - block < CHUNK ? band->across : block + CHUNK;
            left_out += sum_of(prepare(band, block, end - block, times, &term));
        }
        const size_t length = band->top[block] ? fp8_length(band, block) : 0;
        size_t runs = 1;
        if (term.sure[block % CHUNK])
            while ((runs + 1) * length <= SUMMED && block + runs < end && term.sure[(block + runs) % CHUNK]) runs++;
        for (size_t done = 0; done < length; done += SUMMED) {
            const size_t n = length - done < SUMMED ? length - done : SUMMED;
            if (since + n * runs > SUMMED) {
                total[0] += sum_of(sums.signal);
                for (int k = 0; k < FP8_CANDIDATES; k++) total[1 + k] += sum_of(sums.noise[k]);
                sums = nothing;
                since = 0;
            }
            since += n * runs;
            if (term.sure[block % CHUNK])
                sums = add_sure(src + done, n, band, block, runs, &term, sums);
            else
                sums = add_unsure(src + done, n, band, block, &term, sums, total);
        }
        src += band->width * runs;
        block += runs;
    }
    const double unit = (double)candidate[0] * (double)candidate[0];
    *found = (fp8_weighed){(total[0] + sum_of(sums.signal)) * unit, {0, 0}, {0, 0}, {0, 0}};
    for (int k = 0; k < FP8_CANDIDATES; k++) {
        found->noise[k] = (total[1 + k] + sum_of(sums.noise[k])) * (double)candidate[k] * (double)candidate[k];
        /* an entry is off by half of one at most, which is 1/64 / LARGEST_SQUARE or less; a power that is left out is a
         * quarter; and a fraction's square is 1 at least */
        found->doubt[k] = (0.5 / LARGEST_SQUARE * found->signal + 0.25 * left_out * (double)band->width * unit) / 64;
    }
}
#endif
