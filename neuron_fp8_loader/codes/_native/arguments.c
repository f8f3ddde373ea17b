#include "arguments.h"

static int wrong(const char *what, const char *how) {
    PyErr_Format(PyExc_ValueError, "%s %s", what, how);
    return 0;
}

int check_product(const char *what, size_t a, size_t b, size_t *product) {
    if (b && a > (size_t)PY_SSIZE_T_MAX / b) return wrong(what, "is larger than any memory");
    *product = a * b;
    return 1;
}

static int check_address(const char *what, span memory, size_t item) {
    if (memory.size < 0) return wrong(what, "has a negative size");
    if (memory.size && !memory.at) return wrong(what, "has no address");
    if (memory.at > UINTPTR_MAX - (size_t)memory.size) return wrong(what, "ends outside the address space");
    if (memory.at % item) return wrong(what, "is not aligned to its items");
    return 1;
}

int check_span(const char *what, span memory, size_t count, size_t item) {
    size_t bytes;
    if (!check_address(what, memory, item) || !check_product(what, count, item, &bytes)) return 0;
    if ((size_t)memory.size != bytes) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes where its shape says %zu", what, memory.size, bytes);
        return 0;
    }
    return 1;
}

int check_rows(const char *what, span memory, size_t rows, size_t columns, size_t stride, size_t item) {
    size_t last, bytes;
    if (!check_address(what, memory, item)) return 0;
    if (!rows || !columns) return 1;
    if (rows > 1 && stride < columns) return wrong(what, "has rows that overlap");
    if (!check_product(what, rows - 1, stride, &last) || !check_product(what, columns, item, &bytes) ||
        !check_product(what, last, item, &last))
        return 0;
    if (last > (size_t)memory.size || bytes > (size_t)memory.size - last) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, less than its shape says", what, memory.size);
        return 0;
    }
    return 1;
}

int check_length(const char *what, Py_ssize_t length) { return length >= 0 || wrong(what, "is negative"); }

int check_block(const char *what, Py_ssize_t length) { return length >= 1 || wrong(what, "is less than 1"); }

int check_within(const char *what, Py_ssize_t place, Py_ssize_t block, Py_ssize_t length) {
    if (place < 0 || place >= block) return wrong(what, "is not within a block");
    return length <= PY_SSIZE_T_MAX - place || wrong(what, "ends outside the address space");
}

int check_apart(const char *what, span a, span b) {
    const int same = a.at == b.at && a.size == b.size;
    const int apart = a.at + (size_t)a.size <= b.at || b.at + (size_t)b.size <= a.at;
    return same || apart || wrong(what, "overlap without being the same");
}
