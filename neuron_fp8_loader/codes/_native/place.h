/* Placing a matrix of codes, transposed, among the columns of a larger one. */
#ifndef NEURON_FP8_PLACE_H
#define NEURON_FP8_PLACE_H

#include <stddef.h>
#include <stdint.h>

/* dst[c * stride + r] = src[r * columns + c]; src is rows x columns without gaps, stride is at least rows, and the
 * two do not overlap. `vector` 0 leaves the processor's byte shuffles unused; the result is the same. */
void fp8_place(const uint8_t *src, size_t rows, size_t columns, uint8_t *dst, size_t stride, int vector);

#endif
