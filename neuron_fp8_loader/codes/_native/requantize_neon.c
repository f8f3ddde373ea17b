/* The same as requantize_portable.c, bit for bit: eight sums, each of every eighth code. */
#include "requantize.h"

#ifdef FP8_HAVE_NEON
#include <arm_neon.h>

/* Magnitude codes of n codes, 16 at most, NaN and what follows them as 0. */
static inline uint8x16_t load_finite(const uint8_t *src, size_t n) {
    uint8_t some[16] = {0};
    if (n < 16) src = memcpy(some, src, n);
    const uint8x16_t code = vandq_u8(vld1q_u8(src), vdupq_n_u8(FP8_MAGNITUDE));
    return vbicq_u8(code, vceqq_u8(code, vdupq_n_u8(FP8_NAN)));
}

static uint8_t max_neon(const uint8_t *src, size_t n) {
    uint8x16_t max = vdupq_n_u8(0);
    for (size_t i = 0; i < n; i += 16) max = vmaxq_u8(max, load_finite(src + i, n - i));
    return vmaxvq_u8(max);
}

static inline float32x4_t rounding(float32x4_t x) {
    const uint32x4_t power = vandq_u32(vreinterpretq_u32_f32(vmaxq_f32(x, vdupq_n_f32(0x1p-6f))),
                                       vdupq_n_u32(0x7f800000));
    const float32x4_t large = vreinterpretq_f32_u32(vaddq_u32(power, vdupq_n_u32(20 << 23)));
    return vsubq_f32(x, vsubq_f32(vaddq_f32(x, large), large));
}

static inline void add_four(uint16x4_t code, const float ratio[FP8_CANDIDATES], float32x4_t lanes[1 + FP8_CANDIDATES]) {
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(code), 20);
    const float32x4_t value = vmulq_f32(vreinterpretq_f32_u32(bits), vdupq_n_f32(0x1p120f));
    lanes[0] = vaddq_f32(lanes[0], vmulq_f32(value, value));
    for (int k = 0; k < FP8_CANDIDATES; k++) {
        const float32x4_t change = rounding(vmulq_f32(value, vdupq_n_f32(ratio[k])));
        lanes[1 + k] = vaddq_f32(lanes[1 + k], vmulq_f32(change, change));
    }
}

static void measure_neon(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                         double sums[1 + FP8_CANDIDATES]) {
    float32x4_t low[1 + FP8_CANDIDATES], high[1 + FP8_CANDIDATES]; /* of every eight codes the first and last four */
    for (int k = 0; k <= FP8_CANDIDATES; k++) low[k] = high[k] = vdupq_n_f32(0);
    for (size_t i = 0; i < n; i += 16) {
        const uint8x16_t code = load_finite(src + i, n - i);
        const uint16x8_t first = vmovl_u8(vget_low_u8(code)), second = vmovl_u8(vget_high_u8(code));
        add_four(vget_low_u16(first), ratio, low);
        add_four(vget_high_u16(first), ratio, high);
        add_four(vget_low_u16(second), ratio, low);
        add_four(vget_high_u16(second), ratio, high);
    }
    for (int k = 0; k <= FP8_CANDIDATES; k++) {
        float lane[FP8_LANES];
        vst1q_f32(lane, low[k]);
        vst1q_f32(lane + 4, high[k]);
        for (int i = 0; i < FP8_LANES; i++) sums[k] += (double)lane[i];
    }
}

static inline uint8x16x4_t load64(const uint8_t *p) {
    uint8x16x4_t t = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    return t;
}

static void look_up_neon(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]) {
    const uint8x16x4_t low = load64(table), high = load64(table + 64);
    const uint8x16_t magnitude = vdupq_n_u8(FP8_MAGNITUDE);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const uint8x16_t byte = vld1q_u8(src + i), code = vandq_u8(byte, magnitude);
        /* an index out of a table's 64 entries gives 0 */
        const uint8x16_t entry = vorrq_u8(vqtbl4q_u8(low, code), vqtbl4q_u8(high, vsubq_u8(code, vdupq_n_u8(64))));
        vst1q_u8(dst + i, vbslq_u8(magnitude, entry, byte));
    }
    fp8_requantizer_portable.look_up(src + i, dst + i, n - i, table);
}

static double scan_neon(const uint8_t *src, const fp8_band *band) { return fp8_scan(max_neon, src, band); }

const fp8_requantizer fp8_requantizer_neon = {
    .max = max_neon, .scan = scan_neon, .measure = measure_neon, .look_up = look_up_neon};
#endif
