// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's test_hf_safetensor_e2e.py on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_hf_safetensor_e2e.hpp"
