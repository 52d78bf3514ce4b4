// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks as the members of an NCCL communicator: for programs that have one and neither MPI nor another launcher. Component dcp::nccl.
//
// What is done with the calls is in nccl_protocol.hpp: the way of the bytes, deadlines, failures.

#include <dcp/base/config.hpp>
#include <dcp/comm/nccl_protocol.hpp>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstddef>
#include <string>

#if NCCL_VERSION_CODE < 21800
#error "dcp: comm/nccl.hpp needs NCCL 2.18 or later, which has ncclCommSplit"
#endif

namespace dcp {

namespace detail {

/// The calls of the CUDA runtime and of NCCL.
struct NcclApi {
  using Comm = ncclComm_t;
  using Stream = cudaStream_t;
  using Event = cudaEvent_t;

  int current(int& ordinal) { return cudaGetDevice(&ordinal); }
  int use(int ordinal) { return cudaSetDevice(ordinal); }
  int allocate(void*& memory, std::size_t bytes) { return cudaMalloc(&memory, bytes); }
  int free(void* memory) { return cudaFree(memory); }
  // Pinned without fail: copies of pageable memory wait inside the driver for what is in the stream.
  int allocate_pinned(void*& memory, std::size_t bytes) { return cudaHostAlloc(&memory, bytes, cudaHostAllocDefault); }
  int free_pinned(void* memory) { return cudaFreeHost(memory); }
  int create_event(Event& event) { return cudaEventCreateWithFlags(&event, cudaEventDisableTiming); }
  int destroy_event(Event event) { return cudaEventDestroy(event); }
  int record(Event event, Stream stream) { return cudaEventRecord(event, stream); }
  int query(Event event) {
    cudaError_t const status = cudaEventQuery(event);
    if (status == cudaErrorNotReady) static_cast<void>(cudaGetLastError());   // else the program's next look finds it
    return status;
  }
  bool is_not_ready(int status) { return status == cudaErrorNotReady; }
  int copy_in(void* to, void const* from, std::size_t bytes, Stream stream) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream); }
  int copy_out(void* to, void const* from, std::size_t bytes, Stream stream) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream); }
  void forget_error() { static_cast<void>(cudaGetLastError()); }
  char const* device_words(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

  int rank(Comm comm, int& rank) { return ncclCommUserRank(comm, &rank); }
  int size(Comm comm, int& size) { return ncclCommCount(comm, &size); }
  int device(Comm comm, int& ordinal) { return ncclCommCuDevice(comm, &ordinal); }
  int async_error(Comm comm, int& status) {
    ncclResult_t state = ncclSuccess;
    ncclResult_t const result = ncclCommGetAsyncError(comm, &state);
    status = state;
    return result;
  }
  bool is_in_progress(int status) { return status == ncclInProgress; }
  int all_gather(void const* from, void* to, std::size_t bytes, Comm comm, Stream stream) { return ncclAllGather(from, to, bytes, ncclUint8, comm, stream); }
  int broadcast(void* bytes, std::size_t count, int root, Comm comm, Stream stream) { return ncclBroadcast(bytes, bytes, count, ncclUint8, root, comm, stream); }
  int group_start() { return ncclGroupStart(); }
  int group_end() { return ncclGroupEnd(); }
  int send(void const* from, std::size_t bytes, int peer, Comm comm, Stream stream) { return ncclSend(from, bytes, ncclUint8, peer, comm, stream); }
  int receive(void* to, std::size_t bytes, int peer, Comm comm, Stream stream) { return ncclRecv(to, bytes, ncclUint8, peer, comm, stream); }
  int split(Comm comm, int color, int key, Comm* made) { return ncclCommSplit(comm, color, key, made, nullptr); }
  int finalize(Comm comm) { return ncclCommFinalize(comm); }
  int destroy(Comm comm) { return ncclCommDestroy(comm); }
  int abort(Comm comm) { return ncclCommAbort(comm); }
  template <class = Deferred>
  std::string comm_words(int status, Comm comm) {
    std::string words = ncclGetErrorString(static_cast<ncclResult_t>(status));
    if (char const* const last = ncclGetLastError(comm); last != nullptr && *last != '\0') words += " (last error of NCCL: " + std::string{last} + ")";
    return words;
  }
};

}  // namespace detail

/// The ranks of an NCCL communicator, which is borrowed: made before and ended after, both by the caller. The constructor is collective, as are split and the
/// destructor of what split has made.
///
///   comm, stream   Copies and collectives go into `stream`, after what is in it; each call returns when its own have ended. Until an operation returns, the program
///                  must put no operation of `comm` into any stream, and have no ncclGroupStart open and no capture of the stream under way.
///   memory         options.buffer_bytes (1 MiB) on the device of `comm`, and as many pinned bytes on the host, for each object: the only device memory that the library
///                  allocates. cudaFree gives it back, which waits for all work of the device.
///   deadline       options.deadline (10 min) for each round of an operation. Work in the stream counts, and so does the work of a rank that has not come: progress() is heard by
///                  nobody, so choose a deadline beyond the longest time that a rank writes or reads. It holds inside NCCL's own calls, too, where `comm` is
///                  nonblocking (ncclConfig_t::blocking = 0): one that blocks connects to its peers in the first operations, and waits there as long as NCCL does.
///   split          makes a communicator by ncclCommSplit, and ends it in its destructor: with ncclCommDestroy when all of its ranks come within 5 s, else with ncclCommAbort.
///                  A group that another thread uses at the same time needs a stream of its own: split(color, key, stream).
///   threads        one at a time per object; any. The current device of the thread is as before when a call returns.
///
/// Throws    as communicator.hpp says, but each rank finds out by itself: Error(timeout) at the deadline, Error(rank_failed) with NCCL's words on an error of NCCL,
///           Error(device) when CUDA refuses something, Error(ranks_disagree) on all ranks when they call different ones of barrier, exchange and split. The object is
///           poisoned then, and its device memory left alone. The caller has to call ncclCommAbort on `comm` on all ranks, and to make a new one
/// Example   ncclConfig_t config = NCCL_CONFIG_INITIALIZER;  config.blocking = 0;  ncclCommInitRankConfig(&comm, ranks, id, rank, &config);
///           dcp::NcclComm world{comm, stream};  dcp::save<dcp::SafeTensors>(world, place, state);
using NcclComm = BasicNcclComm<detail::NcclApi>;
static_assert(Communicator<NcclComm>);

}  // namespace dcp
