/* What the files of the Python binding share. */
#ifndef NEURON_FP8_MODULE_H
#define NEURON_FP8_MODULE_H

#include "arguments.h" /* first: it includes Python.h */
#include "codes.h"

/* A path's translation; NULL, with an exception set, where there is no such path. */
fp8_translate_fn translator(const char *path);

PyObject *module_read(PyObject *self, PyObject *args);

#endif
