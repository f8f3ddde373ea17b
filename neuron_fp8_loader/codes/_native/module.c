/* Python binding of the kernels: stable ABI, one wheel for every Python from 3.10.
 *
 * Memory is passed as an address and a size (the buffer protocol joined the stable ABI only with Python 3.11);
 * kernel.py, the one caller, holds the tensors alive. Every size is checked against the shapes before it is used.
 */
#include "arguments.h" /* first: it includes Python.h */

#include <math.h>
#include <string.h>

#include "codes.h"
#include "dequantize.h"
#include "requantize.h"

/* Below this a call is shorter than giving up the GIL and taking it back. */
#define RELEASE_GIL_FROM 4096

static const struct {
    const char *name;
    fp8_translate_fn translate;
    fp8_run_fn run;
    fp8_bf16_fn bf16;
} PATHS[] = {
#ifdef FP8_HAVE_AVX2
    {"avx2", fp8_translate_avx2, fp8_run_avx2, fp8_bf16_avx2},
#endif
#ifdef FP8_HAVE_NEON
    {"neon", fp8_translate_neon, fp8_run_portable, fp8_bf16_portable},
#endif
    {"portable", fp8_translate_portable, fp8_run_portable, fp8_bf16_portable},
};
#define N_PATHS (sizeof PATHS / sizeof *PATHS)

static int runs_here(const char *name) {
#ifdef FP8_HAVE_AVX2
    if (!strcmp(name, "avx2")) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") != 0;
    }
#endif
    (void)name;
    return 1;
}

static PyObject *paths(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < N_PATHS; i++) {
        if (!runs_here(PATHS[i].name)) continue;
        PyObject *name = PyUnicode_FromString(PATHS[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* Index of a path that runs here, or -1 with an exception set. */
static int path_called(const char *name) {
    for (size_t i = 0; i < N_PATHS; i++)
        if (!strcmp(PATHS[i].name, name) && runs_here(name)) return (int)i;
    PyErr_Format(PyExc_ValueError, "no kernel path '%s' here", name);
    return -1;
}

static const uint8_t *bytes_at(span memory) { return (const uint8_t *)(uintptr_t)memory.at; }

static uint8_t *writable(span memory) { return (uint8_t *)(uintptr_t)memory.at; }

static PyObject *translate(PyObject *self, PyObject *args) {
    const char *name, *table;
    span src, dst;
    Py_ssize_t table_size;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnKny#:translate", &name, &src.at, &src.size, &dst.at, &dst.size, &table,
                          &table_size))
        return NULL;
    const size_t n = src.size < 0 ? 0 : (size_t)src.size;
    if (!check_span("translate: src", src, n, 1) ||
        ((dst.at || dst.size) &&
         (!check_span("translate: dst", dst, n, 1) || !check_apart("translate: src and dst", src, dst))))
        return NULL;
    if (table_size != FP8_CODES) {
        PyErr_SetString(PyExc_ValueError, "translate: a table has 128 bytes");
        return NULL;
    }
    const int path = path_called(name);
    if (path < 0) return NULL;
    const fp8_translate_fn run = PATHS[path].translate;
    fp8_counts counts = {0, 0, 0, 0};
    if (n >= RELEASE_GIL_FROM) {
        Py_BEGIN_ALLOW_THREADS
        run(bytes_at(src), writable(dst), n, (const uint8_t *)table, &counts);
        Py_END_ALLOW_THREADS
    } else {
        run(bytes_at(src), writable(dst), n, (const uint8_t *)table, &counts);
    }
    return Py_BuildValue("(iKKK)", (int)counts.max, (unsigned long long)counts.above,
                         (unsigned long long)counts.lossy, (unsigned long long)counts.nan);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    span src;
    uint64_t counts[256] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn:histogram", &src.at, &src.size)) return NULL;
    const size_t n = src.size < 0 ? 0 : (size_t)src.size;
    if (!check_span("histogram: src", src, n, 1)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    fp8_histogram(bytes_at(src), n, counts);
    Py_END_ALLOW_THREADS
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

static PyObject *run_max(PyObject *self, PyObject *args) {
    span src, out;
    Py_ssize_t rows, columns, width;
    size_t codes, runs;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnnnnKn:run_max", &src.at, &src.size, &rows, &columns, &width, &out.at, &out.size))
        return NULL;
    if (!check_length("run_max: rows", rows) || !check_length("run_max: columns", columns) ||
        !check_block("run_max: width", width) ||
        !check_product("run_max: src", (size_t)rows, (size_t)columns, &codes) ||
        !check_span("run_max: src", src, codes, 1) ||
        !check_product("run_max: out", (size_t)rows, blocks((size_t)columns, (size_t)width), &runs) ||
        !check_span("run_max: out", out, runs, 1))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    fp8_run_max(bytes_at(src), (size_t)rows, (size_t)columns, (size_t)width, writable(out));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Are all of them finite, and from 0 up, or above it? A scale that is not would make tables of nonsense. */
static int check_scales(const char *what, const double *scales, size_t n, int zero_too) {
    for (size_t i = 0; i < n; i++) {
        if (isfinite(scales[i]) && (zero_too ? scales[i] >= 0 : scales[i] > 0)) continue;
        PyErr_Format(PyExc_ValueError, "%s: value %zu is negative, not finite%s", what, i, zero_too ? "" : " or 0");
        return 0;
    }
    return 1;
}

static PyObject *requantize(PyObject *self, PyObject *args) {
    const char *name;
    span src, dst, before, after;
    Py_ssize_t rows, columns, height, width;
    size_t codes, grid;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnKnnnnnKnKn:requantize", &name, &src.at, &src.size, &dst.at, &dst.size, &rows,
                          &columns, &height, &width, &before.at, &before.size, &after.at, &after.size))
        return NULL;
    if (!check_length("requantize: rows", rows) || !check_length("requantize: columns", columns) ||
        !check_block("requantize: height", height) || !check_block("requantize: width", width) ||
        !check_product("requantize: src", (size_t)rows, (size_t)columns, &codes) ||
        !check_span("requantize: src", src, codes, 1) || !check_span("requantize: dst", dst, codes, 1) ||
        !check_apart("requantize: src and dst", src, dst) ||
        !check_product("requantize: before", blocks((size_t)rows, (size_t)height),
                       blocks((size_t)columns, (size_t)width), &grid) ||
        !check_span("requantize: before", before, grid, sizeof(double)) ||
        !check_span("requantize: after", after, (size_t)rows, sizeof(double)))
        return NULL;
    const double *old = (const double *)(uintptr_t)before.at, *new = (const double *)(uintptr_t)after.at;
    if (!check_scales("requantize: before", old, grid, 1) || !check_scales("requantize: after", new, (size_t)rows, 0))
        return NULL;
    const int path = path_called(name);
    if (path < 0) return NULL;
    fp8_error error = {0, 0};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = fp8_requantize(PATHS[path].run, bytes_at(src), writable(dst), (size_t)rows, (size_t)columns,
                            (size_t)height, (size_t)width, old, new, &error);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    return Py_BuildValue("(dd)", error.signal, error.noise);
}

static PyObject *dequantize(PyObject *self, PyObject *args) {
    const char *name;
    span src, dst, scales;
    Py_ssize_t src_stride, dst_stride, rows, columns, height, width, top, left;
    size_t grid;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnnKnnnnnnnnKn:dequantize", &name, &src.at, &src.size, &src_stride, &dst.at,
                          &dst.size, &dst_stride, &rows, &columns, &height, &width, &top, &left, &scales.at,
                          &scales.size))
        return NULL;
    if (!check_length("dequantize: rows", rows) || !check_length("dequantize: columns", columns) ||
        !check_block("dequantize: height", height) || !check_block("dequantize: width", width) ||
        !check_length("dequantize: src_stride", src_stride) || !check_length("dequantize: dst_stride", dst_stride) ||
        !check_within("dequantize: top", top, height, rows) ||
        !check_within("dequantize: left", left, width, columns))
        return NULL;
    const fp8_part part = {(size_t)rows, (size_t)columns, (size_t)src_stride, (size_t)dst_stride,
                           (size_t)height, (size_t)width, (size_t)top, (size_t)left};
    if (!check_rows("dequantize: src", src, part.rows, part.columns, part.src_stride, 1) ||
        !check_rows("dequantize: dst", dst, part.rows, part.columns, part.dst_stride, sizeof(uint16_t)) ||
        !check_product("dequantize: scales", blocks(part.top + part.rows, part.height),
                       blocks(part.left + part.columns, part.width), &grid) ||
        !check_span("dequantize: scales", scales, grid, sizeof(float)))
        return NULL;
    const int path = path_called(name);
    if (path < 0) return NULL;
    if (rows && columns) {
        Py_BEGIN_ALLOW_THREADS
        fp8_dequantize(PATHS[path].bf16, bytes_at(src), (uint16_t *)(uintptr_t)dst.at, &part,
                       (const float *)(uintptr_t)scales.at);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"paths", paths, METH_NOARGS, "paths() -> list[str]: the paths that run here, fastest first."},
    {"translate", translate, METH_VARARGS,
     "translate(path, src, src_size, dst, dst_size, table) -> (max, above, lossy, nan); dst 0, 0: count only."},
    {"histogram", histogram, METH_VARARGS, "histogram(src, size) -> bytes: 256 native uint64, how often each byte occurs."},
    {"run_max", run_max, METH_VARARGS,
     "run_max(src, src_size, rows, columns, width, out, out_size): largest finite magnitude code of each run."},
    {"requantize", requantize, METH_VARARGS,
     "requantize(path, src, size, dst, size, rows, columns, height, width, before, size, after, size)"
     " -> (signal, noise)."},
    {"dequantize", dequantize, METH_VARARGS,
     "dequantize(path, src, size, stride, dst, size, stride, rows, columns, height, width, top, left, scales, size)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernel", "FP8 code translation.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&MODULE); }
