// SPDX-License-Identifier: Apache-2.0
#pragma once
// dcp: checkpoints of distributed training state. Everything that needs no optional dependency; MPI is in dcp/comm/mpi.hpp, Eigen in
// dcp/ext/eigen.hpp.

// Floor by floor, and each before what needs it: a diagnostic then names two files between the mistake and its reason, not ten.
#include <dcp/base/error.hpp>
#include <dcp/base/result.hpp>
#include <dcp/base/version.hpp>

#include <dcp/core/shape.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/mesh.hpp>
#include <dcp/core/name_map.hpp>
#include <dcp/core/placement.hpp>
#include <dcp/core/flat_bucket.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/tensor_view.hpp>
#include <dcp/core/sharded_tensor.hpp>
#include <dcp/core/state_dict.hpp>

#include <dcp/comm/communicator.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>

#include <dcp/ext/json.hpp>

#include <dcp/media/local_fs.hpp>
#include <dcp/media/memory.hpp>

#include <dcp/storage/storage.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/gguf.hpp>
#include <dcp/storage/torch_dcp.hpp>
#include <dcp/storage/torch_file.hpp>

#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/contents.hpp>
#include <dcp/checkpoint/convert.hpp>
#include <dcp/checkpoint/checkpoint_reader.hpp>
#include <dcp/checkpoint/verify.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/tiered.hpp>
#include <dcp/checkpoint/flat_ranges.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/remove.hpp>
