// The module fastssl._C. Ops register themselves with the dispatcher when it is loaded, so nothing else is bound here.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled backends of fastssl.";
  module.def("build_info", &fastssl::build_info, "What the extension was built with.");
}
