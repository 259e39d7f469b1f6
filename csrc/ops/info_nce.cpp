// Gives the dispatcher the CPU kernels of InfoNCE; the schemas are defined in fastssl/ops/info_nce.py.
#include "info_nce.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastssl, CPU, library) {
  library.impl("info_nce_native", &fastssl::ops::info_nce_cpu);
  library.impl("info_nce_negatives_native", &fastssl::ops::info_nce_negatives_cpu);
}
