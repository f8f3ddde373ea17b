/* Tiles of 64 x 64 bytes, a cache line wide: every line of src is read once and every line of dst written once, whole.
 * In between, both tiles lie in the first-level cache without gaps, where a stride of a power of two does no harm. What
 * is written is not read soon, and mostly more than any cache holds: where its lines allow, it goes past the caches,
 * which else would first read every line from memory.
 */
#include "place.h"

#include <string.h>

#define TILE ((size_t)64)

typedef void (*tile_fn)(const uint8_t in[64][64], uint8_t out[64][64]);

static void tile_portable(const uint8_t in[64][64], uint8_t out[64][64]) {
    for (size_t c = 0; c < TILE; c++)
        for (size_t r = 0; r < TILE; r++) out[c][r] = in[r][c];
}

/* Part of every x86-64 and every AArch64 processor, so nothing is to be found out at run time. */
#if defined(__SSE2__)
#include <emmintrin.h>
#define HAVE_VECTOR 1
typedef __m128i bytes16;
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define LOW(a, b) _mm_unpacklo_epi8(a, b)
#define HIGH(a, b) _mm_unpackhi_epi8(a, b)
#define PAST_CACHES 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define HAVE_VECTOR 1
typedef uint8x16_t bytes16;
#define LOAD(p) vld1q_u8(p)
#define STORE(p, v) vst1q_u8(p, v)
#define LOW(a, b) vzip1q_u8(a, b)
#define HIGH(a, b) vzip2q_u8(a, b)
#endif

#ifdef HAVE_VECTOR
/* Interleaving the first half of 256 bytes with the second turns the eight bits of their index by one place; four
 * times swap its halves, which are row and column. */
static void interleave(const bytes16 in[16], bytes16 out[16]) {
    for (int i = 0; i < 8; i++) {
        out[2 * i] = LOW(in[i], in[i + 8]);
        out[2 * i + 1] = HIGH(in[i], in[i + 8]);
    }
}

static void tile_vector(const uint8_t in[64][64], uint8_t out[64][64]) {
    for (size_t r = 0; r < TILE; r += 16) {
        for (size_t c = 0; c < TILE; c += 16) {
            bytes16 a[16], b[16];
            for (size_t i = 0; i < 16; i++) a[i] = LOAD(&in[r + i][c]);
            interleave(a, b);
            interleave(b, a);
            interleave(a, b);
            interleave(b, a);
            for (size_t i = 0; i < 16; i++) STORE(&out[c + i][r], a[i]);
        }
    }
}
#else
#define tile_vector tile_portable
#endif

static void write_tile(uint8_t *to, size_t stride, const uint8_t out[64][64]) {
    for (size_t i = 0; i < TILE; i++) memcpy(to + i * stride, out[i], TILE);
}

#ifdef PAST_CACHES
static void write_past(uint8_t *to, size_t stride, const uint8_t out[64][64]) {
    for (size_t i = 0; i < TILE; i++)
        for (size_t k = 0; k < TILE; k += 16) _mm_stream_si128((bytes16 *)(to + i * stride + k), LOAD(&out[i][k]));
}
#endif

void fp8_place(const uint8_t *src, size_t rows, size_t columns, uint8_t *dst, size_t stride, int vector) {
    const tile_fn turn = vector ? tile_vector : tile_portable;
    void (*write)(uint8_t *, size_t, const uint8_t[64][64]) = write_tile;
#ifdef PAST_CACHES
    const int past = vector && (uintptr_t)dst % TILE == 0 && stride % TILE == 0; /* whole lines */
    if (past) write = write_past;
#endif
    uint8_t in[64][64], out[64][64];
    memset(in, 0, sizeof in); /* tiles at the edges are filled in part */
    for (size_t r = 0; r < rows; r += TILE) {
        const size_t high = rows - r < TILE ? rows - r : TILE;
        for (size_t c = 0; c < columns; c += TILE) {
            const size_t wide = columns - c < TILE ? columns - c : TILE;
            const uint8_t *from = src + r * columns + c;
            uint8_t *to = dst + c * stride + r;
            if (wide == TILE && high == TILE) { /* apart, so that the length of the copies is known */
                for (size_t i = 0; i < TILE; i++) memcpy(in[i], from + i * columns, TILE);
                turn((const uint8_t(*)[64])in, out);
                write(to, stride, (const uint8_t(*)[64])out);
            } else {
                for (size_t i = 0; i < high; i++) memcpy(in[i], from + i * columns, wide);
                turn((const uint8_t(*)[64])in, out);
                for (size_t i = 0; i < wide; i++) memcpy(to + i * stride, out[i], high);
            }
        }
    }
#ifdef PAST_CACHES
    if (past) _mm_sfence(); /* before another thread is told that it is there */
#endif
}
