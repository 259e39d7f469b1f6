// Gives the dispatcher the CPU kernel of BYOL's loss; the schema is defined in fastssl/ops/normalized_mse.py.
#include "normalized_mse.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastssl, CPU, library) { library.impl("normalized_mse_native", &fastssl::ops::normalized_mse_cpu); }
