// Importing the extension module loads its library, whose static initialisers register the ops.
#pragma once

#include <Python.h>

#define LORA_FAST_MODULE(name)                                                                   \
  PyMODINIT_FUNC PyInit_##name(void) {                                                           \
    static PyModuleDef definition = {                                                            \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                         \
  }
