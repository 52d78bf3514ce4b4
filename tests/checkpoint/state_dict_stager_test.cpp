// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's test_state_dict_stager.py and test_async_process_executor.py on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_stager.hpp"
