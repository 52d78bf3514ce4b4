// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's e2e/test_e2e_save_and_load.py on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_e2e_save_and_load.hpp"
