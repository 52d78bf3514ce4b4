// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's test_restricted_metadata_unpickler.py on ranks that are threads.
#include "support/ranks_on_threads.hpp"

#include "support/upstream_metadata.hpp"
