// What the extension was built with, for the report of fastssl.info and for the check that torch still matches.
#pragma once

#include <pybind11/pybind11.h>

namespace fastssl {

pybind11::dict build_info();

}  // namespace fastssl
