#include "requantize.h"

static uint8_t max_portable(const uint8_t *src, size_t n) {
    uint8_t max = 0;
    for (size_t i = 0; i < n; i++) {
        /* + 1 makes NaN 0x80, whose low bits are 0: no branch, so that this becomes vector code */
        const uint8_t code = (uint8_t)(((src[i] & FP8_MAGNITUDE) + 1) & FP8_MAGNITUDE);
        max = code > max ? code : max;
    }
    return max ? (uint8_t)(max - 1) : 0;
}

double fp8_scan(fp8_max_fn max, const uint8_t *src, const fp8_band *band) {
    double largest = 0;
    for (size_t block = 0; block < band->across; block++, src += band->width) {
        band->top[block] = max(src, fp8_length(band, block));
        band->least[block] = 0;
        const double value = fp8_value(band->top[block]) * band->scales[block];
        largest = value > largest ? value : largest;
    }
    return largest;
}

static double scan_portable(const uint8_t *src, const fp8_band *band) { return fp8_scan(max_portable, src, band); }

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* x minus the nearest of the format's numbers, exactly. */
static float rounding(float x) {
    /* the last bit of 2^20 times x's power of two, or of 2^-6, is the last bit of the nearest code */
    const float large = as_float((bits_of(x > 0x1p-6f ? x : 0x1p-6f) & 0x7f800000) + ((uint32_t)20 << 23));
    return x - ((x + large) - large);
}

static void measure_portable(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                             double sums[1 + FP8_CANDIDATES]) {
    float lanes[1 + FP8_CANDIDATES][FP8_LANES] = {{0}};
    for (size_t i = 0; i < n; i++) {
        const uint8_t code = src[i] & FP8_MAGNITUDE;
        const float value = code == FP8_NAN ? 0 : (float)fp8_value(code);
        lanes[0][i % FP8_LANES] += value * value;
        for (int k = 0; k < FP8_CANDIDATES; k++) {
            const float change = rounding(value * ratio[k]);
            lanes[1 + k][i % FP8_LANES] += change * change;
        }
    }
    for (int k = 0; k < 1 + FP8_CANDIDATES; k++)
        for (int lane = 0; lane < FP8_LANES; lane++) sums[k] += (double)lanes[k][lane];
}

static void look_up_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]) {
    for (size_t i = 0; i < n; i++) dst[i] = (uint8_t)((src[i] & FP8_SIGN) | table[src[i] & FP8_MAGNITUDE]);
}

const fp8_requantizer fp8_requantizer_portable = {
    .max = max_portable, .scan = scan_portable, .measure = measure_portable, .look_up = look_up_portable};
