// SPDX-License-Identifier: Apache-2.0
// Rows of PyTorch's tests of planning and of failing ranks, on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_planner.hpp"

#include "support/upstream_faults.hpp"
