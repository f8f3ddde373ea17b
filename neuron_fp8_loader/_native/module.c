/* Python binding of the kernels: stable ABI, one wheel for every Python from 3.10.
 *
 * Memory is passed as an address and a length (the buffer protocol joined the stable ABI only with
 * Python 3.11); kernel.py, the one caller, holds the tensors alive and has checked their sizes.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "codes.h"

/* Below this a call is shorter than giving up the GIL and taking it back. */
#define RELEASE_GIL_FROM 4096

static const struct {
    const char *name;
    fp8_translate_fn translate;
} PATHS[] = {
#ifdef FP8_HAVE_AVX2
    {"avx2", fp8_translate_avx2},
#endif
#ifdef FP8_HAVE_NEON
    {"neon", fp8_translate_neon},
#endif
    {"portable", fp8_translate_portable},
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

static PyObject *translate(PyObject *self, PyObject *args) {
    const char *name;
    unsigned long long src, dst;
    Py_ssize_t n, table_size;
    const char *table;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKKny#:translate", &name, &src, &dst, &n, &table, &table_size))
        return NULL;
    if (table_size != 128 || n < 0) {
        PyErr_SetString(PyExc_ValueError, "translate: a table has 128 bytes, a length is not negative");
        return NULL;
    }
    fp8_translate_fn run = NULL;
    for (size_t i = 0; i < N_PATHS; i++)
        if (!strcmp(PATHS[i].name, name) && runs_here(name)) run = PATHS[i].translate;
    if (!run) {
        PyErr_Format(PyExc_ValueError, "translate: no path '%s' here", name);
        return NULL;
    }
    fp8_counts counts = {0, 0, 0, 0};
    const uint8_t *from = (const uint8_t *)(uintptr_t)src;
    uint8_t *to = (uint8_t *)(uintptr_t)dst;
    if (n >= RELEASE_GIL_FROM) {
        Py_BEGIN_ALLOW_THREADS
        run(from, to, (size_t)n, (const uint8_t *)table, &counts);
        Py_END_ALLOW_THREADS
    } else {
        run(from, to, (size_t)n, (const uint8_t *)table, &counts);
    }
    return Py_BuildValue("(iKKK)", (int)counts.max, (unsigned long long)counts.above,
                         (unsigned long long)counts.lossy, (unsigned long long)counts.nan);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    unsigned long long src;
    Py_ssize_t n;
    uint64_t counts[256] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn:histogram", &src, &n)) return NULL;
    if (n < 0) {
        PyErr_SetString(PyExc_ValueError, "histogram: a length is not negative");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    fp8_histogram((const uint8_t *)(uintptr_t)src, (size_t)n, counts);
    Py_END_ALLOW_THREADS
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

static PyMethodDef METHODS[] = {
    {"paths", paths, METH_NOARGS, "paths() -> list[str]: the paths that run here, fastest first."},
    {"translate", translate, METH_VARARGS,
     "translate(path, src, dst, n, table) -> (max, above, lossy, nan); dst 0: count only."},
    {"histogram", histogram, METH_VARARGS, "histogram(src, n) -> bytes: 256 native uint64, how often each byte occurs."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernel", "FP8 code translation.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&MODULE); }
