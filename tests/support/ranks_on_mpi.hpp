// SPDX-License-Identifier: Apache-2.0
#pragma once
// Runs the bodies of the upstream rows on the four processes of an MPI job. ranks_on_threads.hpp has the same names.

#include "support/temporary_directory.hpp"

#include <dcp/comm/agree.hpp>
#include <dcp/comm/mpi.hpp>

#include <memory>
#include <string>

namespace dcp::test {

/// Calls body(world, directory) on `ranks` ranks, which share an empty directory. With fewer ranks than the job has, every group of that
/// many runs the body, in a directory of its own.
template <class Body>
void on_ranks(int ranks, Body const& body) {
  MpiComm job{MPI_COMM_WORLD, std::chrono::seconds{60}};
  if (job.size() % ranks != 0) throw Error{ErrorCode::invalid_argument, "this job cannot be split into groups of " + std::to_string(ranks)};
  MpiComm world = job.split(job.rank() / ranks, 0);
  std::unique_ptr<TemporaryDirectory> directory;
  Bytes path;
  if (world.rank() == 0) {
    directory = std::make_unique<TemporaryDirectory>();
    auto const text = as_byte_span(directory->path());
    path.assign(text.begin(), text.end());
  }
  broadcast_bytes(world, path, 0);
  body(world, std::string{as_text(path)});
  job.barrier();
}

}  // namespace dcp::test
