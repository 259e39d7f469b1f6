// Gives the dispatcher the momentum update on the CPU; the schema is defined in fastssl/ops/ema.py.
#include "ema_update.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastssl, CPU, library) { library.impl("ema_update_native", &fastssl::ops::ema_update_cpu); }
