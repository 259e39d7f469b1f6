// Rows of a batch dealt out to the ranks of a process group. fastssl/ops/shuffle.py has the schema and the protocol.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fastssl::ops {

// Sends the rows `order` of x (or all, as they lie), send[r] of them to rank r, and returns receive[r] rows of each
// rank r in the order of ranks. They may be read after wait_rows. A single rank needs no group.
at::Tensor exchange_rows(const at::Tensor& x, const std::optional<at::Tensor>& order, at::IntArrayRef send,
                         at::IntArrayRef receive, const std::string& group);

// Waits until the rows of an exchange are here; raises what has gone wrong with it, each time.
void wait_rows(const at::Tensor& rows);

// To be called once for each exchange, waited for or not: what it holds is let go.
void forget_rows(const at::Tensor& rows);

}  // namespace fastssl::ops
