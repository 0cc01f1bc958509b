#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

void define_headers(py::module_& m);
void define_masks(py::module_& m);
void define_packing(py::module_& m);
void define_resize(py::module_& m);
