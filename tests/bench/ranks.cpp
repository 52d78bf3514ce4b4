// SPDX-License-Identifier: Apache-2.0
// Our side of the benchmarks: MPI ranks that keep a state in memory and save and load it on command.
//
//   mpirun -n <ranks> bench_ranks <folder>
//
// Each rank reads commands from the named pipe <folder>/ours.<rank>, and rank 0 answers on <folder>/ours.reply: so that ranks which wait
// for their turn take no processor from the other side, whose turn it is. A command is words "name=value" after its verb; an answer is
// one line of JSON. Seconds are those of the slowest rank, from a barrier on.
//   state tensors=64 rows=2048 columns=2048 dim=0     float32, split along `dim`
//   fill | clear | check                              the memory: a function of name and position; zeros; compared with that function
//   save place=... as=safetensors|torch files=4 checksums=1 memory=268435456 engine=threads|uring
//   async place=... files=4 stager=copy|deferred executor=thread|process
//                                                     through a manager of a run at `place`, which only ever holds one checkpoint. Seconds are those of
//                                                     the call; `commit` those until wait() returns, `planning` those of that in the call
//   copy                                              the same bytes by memcpy, by as many threads as an async_save copies with
//   compute place=... files=4                         seconds of 200 products of matrices on the main thread, while an async_save is written; without
//                                                     a place: while nothing is
//   load place=... as=safetensors|torch verify=standard
//   open place=... as=safetensors|torch               a file: all that its header says; or a checkpoint of PyTorch's format
//   convert from=... place=... memory=...             PyTorch's format to safetensors
//   verify place=... | read place=...                 all bytes of a checkpoint of PyTorch's format, compared; or only read, by as many threads
//   matrices count=8 rows=4096 columns=4096 dim=0     bfloat16, split along `dim` over the ranks
//   fill-matrices | digest                            different values everywhere; the sum of their bits over all ranks, as `digest`
//   save-matrices place=... quantized=1 files=4       in FP8 blocks of 128 x 128, or as they are
//   load-matrices place=... as=plain|quantized|gguf verify=standard
//   load-parts place=... parts=8                      all column shards of the matrices, on so many ranks that are threads; `read_bytes` of the first
//   raw place=... direct=1                            the same bytes by plain writes of 4 MiB, one after the other, with fsync: no format
//   quit
#include <dcp/comm/mpi.hpp>
#include <dcp/dcp.hpp>
#ifdef WITH_URING
#include <dcp/media/uring_fs.hpp>
#endif
#ifdef WITH_EIGEN
#include <Eigen/Core>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <malloc.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

using Rows = dcp::Placement<dcp::Shard<0>>;
using Columns = dcp::Placement<dcp::Shard<1>>;
using Words = std::map<std::string, std::string>;

std::int64_t number(Words const& words, std::string const& name, std::int64_t otherwise) {
  auto const at = words.find(name);
  return at == words.end() ? otherwise : std::stoll(at->second);
}
std::string text(Words const& words, std::string const& name, std::string otherwise = "") {
  auto const at = words.find(name);
  return at == words.end() ? otherwise : at->second;
}

// Tensors of one shape in one piece of memory, as a framework's arena would hold them.
struct State {
  dcp::MpiComm& world;
  std::int64_t tensors = 0, rows = 0, columns = 0;
  int dim = 0;
  std::vector<float> memory;
  dcp::Box box;

  void make(Words const& words) {
    tensors = number(words, "tensors", 64), rows = number(words, "rows", 2048), columns = number(words, "columns", 2048);
    dim = static_cast<int>(number(words, "dim", 0));
    dcp::DeviceMesh<1> const mesh{world, {world.size()}};
    box = dim == 0 ? dcp::local_box<Rows>(mesh, {rows, columns}) : dcp::local_box<Columns>(mesh, {rows, columns});
    memory = {};
    memory.resize(static_cast<std::size_t>(tensors) * static_cast<std::size_t>(box.size()));
  }
  dcp::StateDict state() {
    dcp::DeviceMesh<1> const mesh{world, {world.size()}};
    dcp::StateDict all;
    auto const each = static_cast<std::size_t>(box.size());
    for (std::int64_t t = 0; t < tensors; ++t) {
      auto const part = std::span{memory}.subspan(static_cast<std::size_t>(t) * each, each);
      std::string const name = "layers." + std::to_string(t) + ".weight";
      if (dim == 0) all.add(name, dcp::ShardedTensor<float, Rows>{mesh, {rows, columns}, part});
      else all.add(name, dcp::ShardedTensor<float, Columns>{mesh, {rows, columns}, part});
    }
    return all;
  }
  // Exact in float32, and different for neighbours in every direction.
  static float value(std::int64_t tensor, std::int64_t row, std::int64_t column) { return static_cast<float>((tensor * 7919 + row * 4099 + column) % 16777213); }
  template <class Visit>
  void for_each(Visit visit) {
    std::size_t i = 0;
    for (std::int64_t t = 0; t < tensors; ++t)
      for (std::int64_t r = 0; r < box.shape[0]; ++r)
        for (std::int64_t c = 0; c < box.shape[1]; ++c) visit(memory[i++], value(t, box.origin[0] + r, box.origin[1] + c));
  }
};

std::map<std::string, int> files_of(std::int64_t tensors, std::int64_t count) {
  std::map<std::string, int> files;
  for (std::int64_t t = 0; t < tensors; ++t)
    files["layers." + std::to_string(t) + ".weight"] = static_cast<int>(t * count / tensors) + 1;
  return files;
}

// What quantized checkpoints are loaded into and saved from: matrices in bfloat16.
struct Matrices {
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, dcp::SafeTensors>;
  using Any = dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>;

  dcp::MpiComm& world;
  std::int64_t count = 0;
  dcp::Layout layout;
  dcp::Box box;
  std::vector<std::vector<dcp::bf16>> memory;

  void make(Words const& words) {
    count = number(words, "count", 8);
    dcp::Extents const shape{number(words, "rows", 4096), number(words, "columns", 4096)};
    dcp::DeviceMesh<1> const mesh{world, {world.size()}};
    layout = number(words, "dim", 0) == 0 ? dcp::layout_of<Rows>(mesh, shape) : dcp::layout_of<Columns>(mesh, shape);
    box = *dcp::box_of_rank(layout, world.rank());
    memory.clear();
    for (std::int64_t t = 0; t < count; ++t) memory.emplace_back(box.size());
  }
  void fill() {
    std::uint32_t x = static_cast<std::uint32_t>(world.rank()) + 1;
    for (auto& matrix : memory)
      for (auto& element : matrix) element = dcp::bf16{static_cast<float>(static_cast<std::int32_t>(x = x * 1664525u + 1013904223u)) * 0x1p-31f};
  }
  std::uint64_t digest() const {
    std::uint64_t sum = 0;
    for (auto const& matrix : memory)
      for (auto const element : matrix) sum += element.bits();
    return sum;
  }
  dcp::StateDict state() {
    dcp::StateDict all;
    for (std::int64_t t = 0; t < count; ++t) all.add_tensor("layers." + std::to_string(t) + ".weight", dcp::DType::bf16, layout, {reinterpret_cast<std::byte*>(memory[static_cast<std::size_t>(t)].data()), dcp::row_major_strides(box.shape)});
    return all;
  }
  dcp::Report save(Words const& words) {
    auto const on = [&]<class S>(S, auto set) {
      dcp::SaveOptions<S> options;
      options.if_exists = dcp::IfExists::replace;
      set(options.storage).file_of = files_of(count, number(words, "files", 4));
      return dcp::save<S>(world, text(words, "place"), state(), options);
    };
    if (number(words, "quantized", 1) == 0) return on(dcp::SafeTensors{}, [](auto& storage) -> auto& { return storage; });
    return on(Fp8{}, [](auto& storage) -> auto& { return storage.base; });
  }
  dcp::Report load(Words const& words, dcp::Verify verify) {
    auto const on = [&]<class S>(S) {
      dcp::LoadOptions<S> options;
      options.verify = verify;
      return dcp::load<S>(world, text(words, "place"), state(), options);
    };
    std::string const as = text(words, "as");
    if (as == "plain") return on(dcp::SafeTensors{});
    if (as == "gguf") return on(dcp::Gguf{});
    return on(Any{});
  }
  // Seconds, and bytes read by the first rank.
  std::pair<double, std::uint64_t> load_parts(Words const& words) const {
    auto const parts = static_cast<int>(number(words, "parts", 8));
    std::pair<double, std::uint64_t> outcome;
    dcp::run_threads(parts, [&](dcp::ThreadComm& threads) {
      dcp::DeviceMesh<1> const mesh{threads, {parts}};
      dcp::Layout const columns = dcp::layout_of<Columns>(mesh, layout.shape);
      dcp::Box const part = *dcp::box_of_rank(columns, threads.rank());
      std::vector<std::vector<dcp::bf16>> target;
      dcp::StateDict wanted;
      for (std::int64_t t = 0; t < count; ++t) {
        auto& matrix = target.emplace_back(part.size());
        wanted.add_tensor("layers." + std::to_string(t) + ".weight", dcp::DType::bf16, columns, {reinterpret_cast<std::byte*>(matrix.data()), dcp::row_major_strides(part.shape)});
      }
      threads.barrier();
      auto const begin = std::chrono::steady_clock::now();
      auto const report = dcp::load<Any>(threads, text(words, "place"), wanted);
      if (threads.rank() != 0) return;
      outcome.first = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      for (auto const& phase : report.phases)
        if (phase.name == "read") outcome.second = phase.ranks[0].bytes;
    });
    return outcome;
  }
};

// Saves in the background, as a trainer makes them: one manager, one description of the state, a new step every time.
class Run {
 public:
  Run(dcp::MpiComm& world, std::string place, State& of, dcp::SaveOptions<dcp::SafeTensors> const& options, bool deferred) : root_{std::move(place)}, state_{of.state()} {
    auto const through = [&]<class Stager>(Stager) {
      auto const checkpoints = std::make_shared<dcp::CheckpointManager<dcp::SafeTensors, Stager>>(world, root_, dcp::ManagerOptions<dcp::SafeTensors>{.save = options});
      save_ = [checkpoints](std::int64_t step, dcp::StateDict const& state) { return checkpoints->async_save(step, state); };
    };
    if (deferred) through(dcp::DeferredStager{});
    else through(dcp::CopyStager{});
  }
  // Not by retention: what that takes is no part of what is timed on the other side either.
  void remove_last() const {
    for (auto const& entry : std::filesystem::directory_iterator{root_})
      if (entry.is_directory()) std::filesystem::remove_all(entry.path());
  }
  dcp::Pending save() { return save_(++step_, state_); }

 private:
  std::string root_;
  dcp::StateDict state_;
  std::function<dcp::Pending(std::int64_t, dcp::StateDict const&)> save_;
  std::int64_t step_ = 0;
};

// The same bytes by memcpy, by the threads and into the kind of memory that saves in the background copy with.
class Copy {
 public:
  void operator()(dcp::ConstByteSpan bytes) {
    if (!stage_ || stage_->pool->capacity() < bytes.size()) {
      memory_ = {};
      stage_.emplace(bytes.size(), dcp::Executor::thread);
      memory_ = stage_->pool->take(bytes.size(), [] {});
    }
    auto& workers = stage_->workers;
    std::size_t const each = (bytes.size() + workers.threads() - 1) / workers.threads();
    for (std::size_t at = 0; at < bytes.size(); at += each)
      workers.submit([this, at, part = bytes.subspan(at, std::min(each, bytes.size() - at))](std::size_t) { std::memcpy(memory_.bytes.data() + at, part.data(), part.size()); });
    workers.finish([] {});
  }

 private:
  std::optional<dcp::detail::Stage<>> stage_;
  dcp::detail::Staged memory_;
};

// What a trainer computes: products of matrices, on one thread and out of its cache.
class Compute {
 public:
  static constexpr int products = 200;

  /// Goes on while `more(products so far)`; the seconds that 200 products take.
  template <class More>
  double operator()(More more) {
    int done = 0;
    auto const begin = std::chrono::steady_clock::now();
    for (; more(done); ++done) multiply();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / done * products;
  }

 private:
#ifdef WITH_EIGEN
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  void multiply() { c_.noalias() = a_ * b_; }
  Matrix a_ = Matrix::Constant(512, 512, 1.5f), b_ = Matrix::Constant(512, 512, 0.5f), c_{512, 512};
#else
  void multiply() { throw std::runtime_error{"built without Eigen"}; }
#endif
};

void must(bool ok, char const* what) {
  if (!ok) throw std::runtime_error{std::string{what} + ": " + std::strerror(errno)};
}

// What a disk takes: this rank's bytes into two files of its own, from an aligned buffer that they are copied to.
void raw_writes(dcp::MpiComm& world, State const& state, std::string const& place, bool direct) {
  constexpr std::size_t piece = 4 << 20;
  dcp::AlignedBuffer buffer{piece};
  auto const bytes = std::as_bytes(std::span{state.memory});
  int const files = std::max(1, 4 / world.size());
  for (int f = 0; f < files; ++f) {
    auto const begin = bytes.size() * static_cast<std::size_t>(f) / static_cast<std::size_t>(files), end = bytes.size() * static_cast<std::size_t>(f + 1) / static_cast<std::size_t>(files);
    std::string const path = place + "/raw-" + std::to_string(world.rank()) + '-' + std::to_string(f);
    int const file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0), 0666);
    must(file >= 0, "open");
    must(::ftruncate(file, static_cast<off_t>(end - begin)) == 0, "ftruncate");
    for (std::size_t at = begin; at < end; at += piece) {
      std::size_t const size = std::min(piece, end - at);
      std::memcpy(buffer.data(), bytes.data() + at, size);
      must(::pwrite(file, buffer.data(), size, static_cast<off_t>(at - begin)) == static_cast<ssize_t>(size), "pwrite");
    }
    must(::fsync(file) == 0, "fsync");
    ::close(file);
  }
  int const directory = ::open(place.c_str(), O_RDONLY | O_DIRECTORY);
  must(directory >= 0 && ::fsync(directory) == 0, "fsync of the directory");
  ::close(directory);
}

dcp::Verify verify_of(std::string const& name) {
  if (name == "none") return dcp::Verify::none;
  return name == "full" ? dcp::Verify::full : dcp::Verify::standard;
}

// All data files below a directory, in pieces of 1 MiB.
std::uint64_t read_all(std::string const& place, int threads) {
  dcp::Workers<> workers{static_cast<std::size_t>(threads)};
  std::vector<dcp::AlignedBuffer> buffers(static_cast<std::size_t>(threads));
  std::uint64_t all = 0;
  for (auto const& entry : std::filesystem::directory_iterator{place}) {
    if (entry.path().extension() != ".distcp") continue;
    auto const file = std::make_shared<dcp::FileHandle>(dcp::FileHandle::open_read(entry.path().string()));
    std::uint64_t const size = file->size();
    all += size;
    for (std::uint64_t begin = 0; begin < size; begin += 4 << 20)
      workers.submit([&buffers, file, begin, size](std::size_t thread) {
        if (buffers[thread].size() == 0) buffers[thread] = dcp::AlignedBuffer{1 << 20};
        for (std::uint64_t at = begin, end = std::min<std::uint64_t>(size, begin + (4 << 20)); at < end; at += 1 << 20)
          file->read_at(at, {buffers[thread].data(), static_cast<std::size_t>(std::min<std::uint64_t>(1 << 20, end - at))});
      });
  }
  workers.finish([] {});
  return all;
}

// The largest resident size so far; only ever rises.
std::int64_t peak_kib() {
  std::ifstream in{"/proc/self/status"};
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6));
  return 0;
}
std::int64_t resident_kib() {
  std::ifstream in{"/proc/self/status"};
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("VmRSS:")) return std::stoll(line.substr(6));
  return 0;
}
// From here on; and what the allocator keeps for later is not counted as there before.
void forget_peak() {
  ::malloc_trim(0);
  std::ofstream{"/proc/self/clear_refs"} << 5;
}

int serve(dcp::MpiComm& world, std::string const& folder) {
  State state{world, 0, 0, 0, 0, {}, {}};
  std::map<std::string, Run> runs;   // by place
  Copy copy;
  Compute compute;
  Matrices matrices{world, 0, {}, {}, {}};
  std::ifstream commands{folder + "/ours." + std::to_string(world.rank())};
  std::ofstream answers;
  if (world.rank() == 0) answers.open(folder + "/ours.reply");
  for (std::string line; std::getline(commands, line);) {
    std::istringstream in{line};
    std::string verb;
    in >> verb;
    Words words;
    for (std::string word; in >> word;) words[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    if (verb == "quit") return 0;
    std::string answer, failure;
    double seconds = 0, commit = 0, planning = 0, over_read = 0;
    std::uint64_t digest = 0, read_bytes = 0;
    if (verb != "async") forget_peak();   // no trainer takes its allocator's memory away between saves
    std::int64_t const before = resident_kib();
    try {
      std::string const place = text(words, "place");
      auto const timed = [&](auto body) {
        world.barrier();
        auto const begin = std::chrono::steady_clock::now();
        body();
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      };
      auto const run = [&]() -> Run& {
        auto at = runs.find(place);
        if (at == runs.end()) {
          dcp::SaveOptions<dcp::SafeTensors> options;
          if (auto const files = number(words, "files", 1); files > 1) options.storage.file_of = files_of(state.tensors, files);
          if (text(words, "executor") == "process") options.executor = dcp::Executor::process, options.saver_program = DCP_SAVER_PROGRAM;
          at = runs.try_emplace(place, world, place, state, options, text(words, "stager") == "deferred").first;
        }
        if (world.rank() == 0) at->second.remove_last();
        return at->second;
      };
      if (verb == "state") {
        runs.clear();
        state.make(words);
      } else if (verb == "fill") {
        state.for_each([](float& x, float wanted) { x = wanted; });
      } else if (verb == "clear") {
        std::fill(state.memory.begin(), state.memory.end(), 0.f);
      } else if (verb == "check") {
        state.for_each([](float& x, float wanted) {
          if (x != wanted) throw std::runtime_error{"wrong contents"};
        });
      } else if (verb == "save") {
        auto const save_on = [&]<class On>(On) {
          dcp::SaveOptions<On> options;
          options.if_exists = dcp::IfExists::replace;
          options.memory_bytes = static_cast<std::uint64_t>(number(words, "memory", static_cast<std::int64_t>(dcp::default_memory_bytes)));
          options.threads = static_cast<int>(number(words, "threads", options.threads));
          options.checksums = number(words, "checksums", 1) != 0;
          if (text(words, "direct") == "never") options.direct_io = dcp::DirectIo::never;
          if constexpr (requires { options.storage.file_of; })
            if (auto const files = number(words, "files", 1); files > 1) options.storage.file_of = files_of(state.tensors, files);
          if (world.rank() == 0) std::filesystem::remove_all(place);   // the other side's is removed before its turn, too
          timed([&] {
            auto const report = dcp::save<On>(world, place, state, options);
            if (number(words, "report", 0) != 0 && world.rank() == 0) std::cerr << report << '\n';
          });
        };
#ifdef WITH_URING
        if (text(words, "engine") == "uring") save_on(dcp::BasicSafeTensors<dcp::UringFs>{});
        else
#endif
          if (text(words, "as") == "torch") save_on(dcp::TorchDcp{});
          else save_on(dcp::SafeTensors{});
      } else if (verb == "async") {
        Run& here = run();
        dcp::Report report;
        double stall = 0;
        timed([&] {
          auto const begin = std::chrono::steady_clock::now();
          dcp::Pending pending = here.save();
          stall = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
          report = pending.wait();
        });
        commit = std::exchange(seconds, stall);
        for (auto const& phase : report.phases)
          if (phase.name == "agree" || phase.name == "plan") planning += phase.longest();
        if (number(words, "report", 0) != 0 && world.rank() == 0) std::cerr << report << '\n';
      } else if (verb == "copy") {
        timed([&] { copy(std::as_bytes(std::span{state.memory})); });
      } else if (verb == "compute") {
        if (place.empty()) {
          seconds = compute([](int done) { return done < Compute::products; });
        } else {
          dcp::Pending pending = run().save();
          seconds = compute([&](int) { return !pending.done(); });
          pending.wait();
        }
      } else if (verb == "load") {
        auto const load_from = [&]<class From>(From) {
          dcp::LoadOptions<From> options;
          options.verify = verify_of(text(words, "verify", "standard"));
          options.memory_bytes = static_cast<std::uint64_t>(number(words, "memory", static_cast<std::int64_t>(dcp::default_memory_bytes)));
          options.threads = static_cast<int>(number(words, "threads", options.threads));
          timed([&] {
            auto const report = dcp::load<From>(world, place, state, options);
            over_read = static_cast<double>(report.tensor_bytes + report.over_read_bytes + report.verification_bytes) / static_cast<double>(report.tensor_bytes);
            if (number(words, "report", 0) != 0 && world.rank() == 0) std::cerr << report << '\n';
          });
        };
        if (text(words, "as") == "torch") load_from(dcp::TorchDcp{});
        else load_from(dcp::SafeTensors{});
      } else if (verb == "convert") {
        dcp::ConvertOptions<dcp::TorchDcp, dcp::SafeTensors> options;
        options.save.memory_bytes = static_cast<std::uint64_t>(number(words, "memory", static_cast<std::int64_t>(dcp::default_memory_bytes)));
        if (world.rank() == 0) std::filesystem::remove_all(place);
        timed([&] { dcp::convert<dcp::TorchDcp, dcp::SafeTensors>(world, text(words, "from"), place, options); });
      } else if (verb == "verify") {
        timed([&] { read_bytes = dcp::verify<dcp::TorchDcp>(world, place).verified_bytes; });
      } else if (verb == "read") {
        timed([&] { read_bytes = read_all(place, dcp::LoadOptions<dcp::TorchDcp>{}.threads); });
      } else if (verb == "matrices") {
        matrices.make(words);
      } else if (verb == "fill-matrices") {
        matrices.fill();
      } else if (verb == "digest") {
        digest = matrices.digest();
      } else if (verb == "save-matrices") {
        if (world.rank() == 0) std::filesystem::remove_all(place);
        timed([&] { matrices.save(words); });
      } else if (verb == "load-matrices") {
        dcp::Report report;
        timed([&] { report = matrices.load(words, verify_of(text(words, "verify", "standard"))); });
        for (auto const& phase : report.phases)
          if (phase.name == "read") read_bytes = phase.ranks[static_cast<std::size_t>(world.rank())].bytes;
        if (number(words, "report", 0) != 0 && world.rank() == 0) std::cerr << report << '\n';
      } else if (verb == "load-parts") {
        std::tie(seconds, read_bytes) = matrices.load_parts(words);
      } else if (verb == "open" && text(words, "as") == "torch") {
        timed([&] {
          if (dcp::contents<dcp::TorchDcp>(world, place).tensors.empty()) failure = "no tensors";
        });
      } else if (verb == "open") {
        timed([&] {
          dcp::FileHandle const file = dcp::FileHandle::open_read(place);
          std::uint64_t const size = file.size();
          std::array<std::byte, 8> first{};
          file.read_at(0, first);
          dcp::Bytes header(static_cast<std::size_t>(dcp::safetensors::header_bytes(first, size)));
          file.read_at(8, header);
          auto const parsed = dcp::safetensors::parse_header(header, size);
          std::vector<std::string_view> names;
          for (auto const& tensor : parsed.tensors) names.push_back(tensor.name);
          if (names.empty()) failure = "no tensors";
        });
      } else if (verb == "raw") {
        timed([&] { raw_writes(world, state, place, number(words, "direct", 1) != 0); });
      } else {
        failure = "no such command: " + verb;
      }
    } catch (std::exception const& error) {
      failure = error.what();
    }
    std::int64_t const extra = peak_kib() - before;
    struct Outcome {
      double seconds, commit, planning;
      std::int64_t extra;
      std::uint64_t digest, read_bytes;
      bool failed;
    };
    auto const outcomes = dcp::all_gather_value(dcp::CommRef{world}, Outcome{seconds, commit, planning, extra, digest, read_bytes, !failure.empty()});
    Outcome all{0, 0, 0, 0, 0, 0, false};
    for (auto const& o : outcomes)
      all = {std::max(all.seconds, o.seconds), std::max(all.commit, o.commit), std::max(all.planning, o.planning), std::max(all.extra, o.extra), all.digest + o.digest, all.read_bytes + o.read_bytes, all.failed || o.failed};
    if (!failure.empty()) std::cerr << "rank " << world.rank() << ": " << verb << ": " << failure << '\n';
    if (world.rank() == 0) answers << "{\"seconds\": " << all.seconds << ", \"commit\": " << all.commit << ", \"planning\": " << all.planning << ", \"extra_kib\": " << all.extra << ", \"read_times\": " << over_read << ", \"digest\": " << all.digest << ", \"read_bytes\": " << all.read_bytes << ", \"failed\": " << (all.failed ? "true" : "false") << "}\n" << std::flush;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: bench_ranks <folder with the pipes>\n";
    return 2;
  }
  MPI_Init(&argc, &argv);
  int status = 1;
  {
    dcp::MpiComm world{MPI_COMM_WORLD};
    status = serve(world, argv[1]);
  }
  MPI_Finalize();
  return status;
}
