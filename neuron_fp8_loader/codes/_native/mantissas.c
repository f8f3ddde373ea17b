/* The mantissa that the rows of a block row have in common: what best_mantissas in codes/requantize.py does, which says
 * why, in the same arithmetic. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "requantize.h"

#define GRID 32        /* candidates that lie evenly */
#define FROM_SCALES 32 /* and mantissas of the largest scales */
#define AT_ONCE 64     /* scales */

static float mantissa_of(double scale) { /* in [1, 2), or 0 */
    int exponent;
    return (float)(2 * frexp(scale, &exponent));
}

/* The largest scales, largest first; returns how many. */
static size_t largest_scales(const double *scales, size_t n, double largest[FROM_SCALES]) {
    size_t found = 0;
    for (size_t i = 0; i < n; i++) {
        size_t at = found < FROM_SCALES ? found++ : FROM_SCALES;
        if (at == FROM_SCALES) {
            if (!(scales[i] > largest[FROM_SCALES - 1])) continue;
            at--;
        }
        for (; at && scales[i] > largest[at - 1]; at--) largest[at] = largest[at - 1];
        largest[at] = scales[i];
    }
    return found;
}

/* To the costs of n candidates, those of AT_ONCE scales; some of the last may be 0. */
static void add_costs(const float *mantissas, const double *energies, const float *candidates, double *costs, size_t n,
                      const float errors[FP8_ERRORS]) {
    for (size_t k = 0; k < n; k++) {
        int32_t which[AT_ONCE];
        double sum[4] = {0, 0, 0, 0}; /* which need not wait for each other */
        for (size_t i = 0; i < AT_ONCE; i++) { /* vector code */
            float ratio = mantissas[i] / candidates[k]; /* more than 1/2 and less than 2; or 0 */
            uint32_t bits;
            memcpy(&bits, &ratio, sizeof bits);
            bits = (bits & 0x7fffff) | 0x3f800000; /* from 1 up to 2 */
            memcpy(&ratio, &bits, sizeof bits);
            which[i] = (int32_t)((ratio - 1) * FP8_ERRORS);
        }
        for (size_t i = 0; i < AT_ONCE; i += 4)
            for (size_t lane = 0; lane < 4; lane++) sum[lane] += (double)errors[which[i + lane]] * energies[i + lane];
        costs[k] += sum[0] + sum[1] + (sum[2] + sum[3]);
    }
}

void fp8_best_mantissas(const double *scales, size_t rows, size_t across, const float errors[FP8_ERRORS],
                        double *mantissas) {
    for (size_t row = 0; row < rows; row++, scales += across) {
        double largest[FROM_SCALES], costs[GRID + FROM_SCALES] = {0};
        float candidates[GRID + FROM_SCALES];
        const size_t n = GRID + largest_scales(scales, across, largest);
        for (size_t k = 0; k < GRID; k++) candidates[k] = 1 + (float)k / GRID;
        for (size_t k = GRID; k < n; k++) {
            const float mantissa = mantissa_of(largest[k - GRID]);
            candidates[k] = mantissa >= 1 && mantissa < 2 ? mantissa : 1; /* 0, or rounded to 2 */
        }
        const double most = n > GRID && largest[0] > DBL_MIN ? largest[0] : DBL_MIN;
        for (size_t first = 0; first < across; first += AT_ONCE) {
            const size_t some = across - first < AT_ONCE ? across - first : AT_ONCE;
            float own[AT_ONCE] = {0};
            double energies[AT_ONCE] = {0};
            for (size_t i = 0; i < some; i++) {
                const double energy = scales[first + i] / most;
                own[i] = mantissa_of(scales[first + i]);
                if (own[i] == 2) own[i] = 2 - FLT_EPSILON; /* rounded to it */
                energies[i] = energy * energy;
            }
            add_costs(own, energies, candidates, costs, n, errors);
        }
        size_t best = 0;
        for (size_t k = 1; k < n; k++)
            if (costs[k] < costs[best]) best = k;
        mantissas[row] = (double)candidates[best];
    }
}
