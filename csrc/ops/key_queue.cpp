// Gives the dispatcher the queue's CPU kernels; the schemas are defined in fastssl/ops/queue.py.
#include "key_queue.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastssl, CPU, library) {
  library.impl("enqueue_native", &fastssl::ops::enqueue_cpu);
  library.impl("dequeue_native", &fastssl::ops::dequeue_cpu);
}
