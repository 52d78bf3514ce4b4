// SPDX-License-Identifier: Apache-2.0
// needs: mpi cuda nccl
// kernels: cuda_trainer_kernels.cu
// test: {gpu} {tmp}/run --steps 60 --save-every 10 --check
//
// A trainer whose tensors are on GPUs: a small network, by SGD with momentum. Its kernels are in the file beside this one.
//
//   mpirun -np 8 cuda_trainer run --steps 1000 --save-every 100      one rank for each GPU; without mpirun it is one rank
//
// All ranks hold all weights and take examples of their own; NCCL adds up the gradients. Training goes on from the newest checkpoint
// below `run`. Saves are deferred: the call puts copies into streams, the next step waits for them there, and the host does not. With
// --check the steps after an older checkpoint are done once more at the end: each loss must have the same bits.
//
// MPI tells the ranks the name of the communicator, and which of them are on one machine. All else, of training and of dcp, goes through
// NCCL, in one stream. So the few words that ranks exchange in a save come after the step that is in the stream; with a communicator from
// ncclCommSplit and a stream of its own dcp would not wait for that.
#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/nccl.hpp>
#include <dcp/device/cuda.hpp>
#include <dcp/storage/safetensors.hpp>

#include "cuda_trainer_kernels.hpp"

#include <mpi.h>
#include <nccl.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string{"CUDA: "} + cudaGetErrorString(status));
}
void must(ncclResult_t status) {
  if (status != ncclSuccess) throw std::runtime_error(std::string{"NCCL: "} + ncclGetErrorString(status));
}

struct Options {
  std::string run;
  std::int64_t steps = 1000, save_every = 100;
  bool check = false;
};

/// Memory of the device.
struct Floats {
  explicit Floats(std::size_t count) {
    must(cudaMalloc(reinterpret_cast<void**>(&data), count * sizeof(float)));
    must(cudaMemset(data, 0, count * sizeof(float)));
  }
  Floats(Floats const&) = delete;
  Floats& operator=(Floats const&) = delete;
  ~Floats() { static_cast<void>(cudaFree(data)); }
  float* data = nullptr;
};

/// Tensors over memory in which numbers lie as the weights do; every rank has all of each. They are views: nothing reads the memory here.
dcp::StateDict tensors(dcp::DeviceMesh<1> const& mesh, float* memory) {
  using Tensor = dcp::ShardedTensor<float, dcp::Placement<dcp::Replicate>>;
  return {{"up.weight", Tensor{mesh, {hidden, inputs}, std::span{memory, up}}},
          {"up.bias", Tensor{mesh, {hidden}, std::span{memory + up, hidden}}},
          {"down.weight", Tensor{mesh, {hidden}, std::span{memory + up + hidden, hidden}}}};
}

void train(ncclComm_t comm, cudaStream_t stream, Options const& options) {
  dcp::NcclComm world{comm, stream};
  dcp::DeviceMesh<1> mesh{world, {world.size()}};
  auto const steps = static_cast<std::size_t>(options.steps);
  Floats w{weights}, velocity{weights}, gradient{weights + 1}, h{batch * hidden}, error{batch}, losses{steps};
  must(cudaDeviceSynchronize());                                         // the zeros came in the order of another stream
  initialise(stream, w.data);

  std::int64_t step = 0, drawn = 0;                                      // drawn: examples, by all ranks
  dcp::StateDict const state{{"model", tensors(mesh, w.data)}, {"momentum", tensors(mesh, velocity.data)}, {"step", step}, {"drawn", drawn}};
  std::vector<dcp::DeviceStream> const on{dcp::on(stream)};              // what saves and loads do comes in the order of this stream
  dcp::CheckpointManager<dcp::SafeTensors, dcp::DeferredStager> checkpoints{world, options.run, {.keep_last = 3, .save = {.on = on}, .load = {.on = on}}};
  if (auto const last = checkpoints.latest()) checkpoints.load(*last, state);
  std::int64_t const begin = step;

  auto const train_step = [&] {
    gradients(stream, w.data, drawn + world.rank() * batch, h.data, error.data, gradient.data);
    must(ncclAllReduce(gradient.data, gradient.data, weights + 1, ncclFloat, ncclSum, comm, stream));
    update(stream, w.data, velocity.data, gradient.data, 1.0f / static_cast<float>(world.size()), losses.data + step);
    ++step;
    drawn += world.size() * batch;
  };
  std::optional<dcp::Pending> pending;                                   // the save that is under way
  while (step < options.steps) {
    train_step();
    if (pending) pending->wait_staged();                                 // by now the copies have been made; the files are written behind the program
    if (step % options.save_every == 0 || step == options.steps) {
      pending.emplace(checkpoints.async_save(step, state));              // puts copies behind this step,
      pending->staged_event().before(dcp::on(stream));                   // and the next step behind the copies
    }
  }

  auto const read_losses = [&] {
    std::vector<float> read(steps);
    must(cudaMemcpyAsync(read.data(), losses.data, steps * sizeof(float), cudaMemcpyDeviceToHost, stream));
    must(cudaStreamSynchronize(stream));
    return read;
  };
  auto const found = read_losses();
  bool const speaks = world.rank() == 0;
  for (auto i = static_cast<std::size_t>(begin); speaks && i < steps; ++i) std::printf("step %zu loss %a %.6f\n", i + 1, static_cast<double>(found[i]), static_cast<double>(found[i]));
  if (pending) {
    dcp::Report const report = pending->wait();                          // throws, on all ranks, what any rank threw
    if (speaks) std::printf("saved %s: the call took %.4f s\n", report.place.c_str(), report.stall_seconds);
  }
  if (!options.check) return;

  std::int64_t const oldest = checkpoints.steps().front();
  checkpoints.load(oldest, state);                                       // weights, momentum, and how far the data was
  auto const first = static_cast<std::size_t>(step);
  while (step < options.steps) train_step();
  auto const again = read_losses();
  if (first < static_cast<std::size_t>(begin)) throw std::runtime_error("the checkpoint is older than this process: nothing to compare with");
  if (std::memcmp(&again[first], &found[first], (steps - first) * sizeof(float)) != 0) throw std::runtime_error("the losses after step " + std::to_string(oldest) + " are not what they were");
  if (speaks) std::printf("steps %zu to %zu once more, from the checkpoint of step %zu: the same losses, bit for bit\n", first + 1, steps, first);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    std::string_view const word = argv[i];
    if (word == "--check") options.check = true;
    else if (word == "--steps" && i + 1 < argc) options.steps = std::stoll(argv[++i]);
    else if (word == "--save-every" && i + 1 < argc) options.save_every = std::stoll(argv[++i]);
    else options.run = word;
  }
  if (options.run.empty() || options.run.starts_with("-") || options.steps < 1 || options.save_every < 1) throw std::runtime_error("usage: cuda_trainer RUN [--steps 1000] [--save-every 100] [--check]");
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  try {
    Options const options = parse(argc, argv);
    int rank = 0, ranks = 0, local = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Comm machine = MPI_COMM_NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &local);
    MPI_Comm_free(&machine);
    must(cudaSetDevice(local));                                          // refused where a machine has more ranks than GPUs
    ncclUniqueId id{};
    if (rank == 0) must(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    must(ncclCommInitRank(&comm, ranks, id, rank));
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    train(comm, stream, options);
    must(ncclCommDestroy(comm));
    must(cudaStreamDestroy(stream));
  } catch (std::exception const& error) {                                // perhaps only this rank has it, and others would wait
    std::cerr << error.what() << '\n';
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
}
