// SPDX-License-Identifier: Apache-2.0
// Rows of PyTorch's tests of its format utilities on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_format_utils.hpp"
