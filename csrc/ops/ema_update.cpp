// Gives the dispatcher the momentum update on the CPU, whose schema is defined in fastssl/ops/ema.py, and the quick
// look at its inputs.
#include "ema_update.h"

#include <torch/library.h>

#include "tensors/ema_fit.h"

TORCH_LIBRARY_FRAGMENT(fastssl, library) {
  library.def("ema_update_fits(Tensor[] targets, Tensor[] sources, Tensor[] shadows, Tensor? momentum) -> bool",
              &fastssl::tensors::ema_fits);
}

TORCH_LIBRARY_IMPL(fastssl, CPU, library) { library.impl("ema_update_native", &fastssl::ops::ema_update_cpu); }
