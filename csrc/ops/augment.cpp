// Gives the dispatcher the augmentation's CPU kernel; the schema is defined in fastssl/ops/augment.py.
#include "augment.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastssl, CPU, library) { library.impl("augment_native", &fastssl::ops::augment_cpu); }
