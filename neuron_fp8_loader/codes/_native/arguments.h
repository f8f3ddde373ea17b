/* Checking what Python passes: an address is worth nothing without the size of what lies there. */
#ifndef NEURON_FP8_ARGUMENTS_H
#define NEURON_FP8_ARGUMENTS_H

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

/* Memory as Python passes it: an address and how many bytes are good from there. */
typedef struct {
    unsigned long long at;
    Py_ssize_t size;
} span;

/* Each check returns 1, or 0 with ValueError set; `what` names the argument, after the function. */

/* Are there exactly count x item bytes, at an address that suits items of that size? */
int check_span(const char *what, span memory, size_t count, size_t item);

/* The rows of a matrix: `columns` items each, their beginnings `stride` items apart, within the span. */
int check_rows(const char *what, span memory, size_t rows, size_t columns, size_t stride, size_t item);

/* Lengths from 0 up; a block's from 1 up. */
int check_length(const char *what, Py_ssize_t length);
int check_block(const char *what, Py_ssize_t length);

/* A place within a block, from which `length` more are counted. */
int check_within(const char *what, Py_ssize_t place, Py_ssize_t block, Py_ssize_t length);

/* a x b, which must be a possible number of bytes. */
int check_product(const char *what, size_t a, size_t b, size_t *product);

/* Two spans that are one and the same, or do not overlap. */
int check_apart(const char *what, span a, span b);

/* How many blocks cover a length. */
static inline size_t blocks(size_t length, size_t block) { return length / block + (length % block != 0); }

#endif
