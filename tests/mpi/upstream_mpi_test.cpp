// SPDX-License-Identifier: Apache-2.0
// The rows of PyTorch's checkpoint tests on the four processes of an MPI job.
// ranks: 4
#include "support/ranks_on_mpi.hpp"

#include "support/upstream_dtensor.hpp"
#include "support/upstream_e2e_save_and_load.hpp"
#include "support/upstream_faults.hpp"
#include "support/upstream_format_utils.hpp"
#include "support/upstream_hf_safetensor_e2e.hpp"
#include "support/upstream_hf_storage.hpp"
#include "support/upstream_metadata.hpp"
#include "support/upstream_planner.hpp"
#include "support/upstream_quantized.hpp"
#include "support/upstream_stager.hpp"
