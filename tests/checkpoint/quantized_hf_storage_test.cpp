// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's tests about quantized checkpoints on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_quantized.hpp"
