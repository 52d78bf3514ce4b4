// SPDX-License-Identifier: Apache-2.0
// Our side of the benchmarks on a GPU: one process that keeps a state in the memory of device 0, and saves and loads it on command.
//
//   bench_gpu <folder>      reads commands from the named pipe <folder>/ours.0 and answers on <folder>/ours.reply, as ranks.cpp does
//   bench_gpu --info        says which device there is, and its free memory; exit status 1 if there is none
//
//   state tensors=200 rows=640 columns=4096           float32, in one piece of device memory
//   fill | clear | check                              different bytes everywhere; zeros; compared with those bytes
//   save place=... | load place=...
//   async place=... stager=copy|deferred              through a manager. Seconds are those of the call; `staged` those until the copies from the device have been
//                                                     made, `waited` those of wait_staged() after that, `commit` those until wait() returns
//   pinned way=out|in                                 as many bytes by one cudaMemcpyAsync, to or from pinned memory
//   read place=...                                    all bytes of a checkpoint's files, by as many threads as a load has
//   raw place=...                                     as many bytes written past the page cache, by as many threads as a save has, and fsync; `direct`: whether it was past
//   compute place=...                                 the median step of products of matrices while a deferred save is under way; without a place: while none is
//   matrices count=8 | fill-matrices                  bfloat16, 4096 x 4096, on the device
//   save-matrices place=... as=plain|fp8 | load-matrices place=... as=plain|fp8 | check-matrices place=... as=plain|fp8     the last against a load to the host
//   quit
//
// With DCP_BENCH_DRY the device is memory of the host's: no figure means anything then, but all of this runs.
#include <dcp/dcp.hpp>

#ifdef DCP_BENCH_DRY
#include <dcp/device/streams.hpp>
#else
#include <dcp/device/cuda.hpp>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

namespace {

using Clock = std::chrono::steady_clock;
using Words = std::map<std::string, std::string>;
using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, dcp::SafeTensors>;

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

#ifdef DCP_BENCH_DRY
// The calls of a toolkit by which everything is done at once, in memory that is said to be a device's.
struct HostApi {
  using Stream = int;
  using Event = int;
  static constexpr std::align_val_t alignment{4096};
  std::string_view name() const { return "dry"; }
  int where(void const* address, dcp::MemoryPlace& place) {
    std::lock_guard const lock{mutex};
    auto const at = static_cast<std::byte const*>(address);
    auto next = memory.upper_bound(at);
    place = {};
    if (next != memory.begin() && at < std::prev(next)->first + std::prev(next)->second) place = {dcp::MemoryKind::device, 0};
    return 0;
  }
  int enter(int) { return 0; }
  int leave() { return 0; }
  int create_stream(int& stream) { return stream = 0; }
  int destroy_stream(int) { return 0; }
  int create_event(int& event) { return event = 0; }
  int destroy_event(int) { return 0; }
  int record(int, int) { return 0; }
  int wait(int, int) { return 0; }
  int query(int) { return 0; }
  bool is_not_ready(int status) { return status == -1; }
  int copy(void* to, void const* from, std::size_t bytes, int) {
    std::memcpy(to, from, bytes);
    return 0;
  }
  int copy_rows(void* to, std::size_t to_pitch, void const* from, std::size_t from_pitch, std::size_t bytes, std::size_t rows, int) {
    for (std::size_t r = 0; r < rows; ++r) std::memcpy(static_cast<std::byte*>(to) + r * to_pitch, static_cast<std::byte const*>(from) + r * from_pitch, bytes);
    return 0;
  }
  int allocate_pinned(void*& to, std::size_t bytes) {
    to = ::operator new(bytes, alignment);
    return 0;
  }
  int free_pinned(void* of) {
    ::operator delete(of, alignment);
    return 0;
  }
  void forget_error() {}
  std::string words(int) { return "an error"; }
  int stream_of(void*) { return 0; }

  std::mutex mutex;
  std::map<std::byte const*, std::size_t> memory;
};

class Gpu {
 public:
  Gpu() { dcp::detail::DeviceDrivers<>::instance().add(driver_); }
  std::string name() const { return "none: memory of the host"; }
  std::uint64_t free_bytes() const { return std::uint64_t{4} << 30; }
  dcp::DeviceStream on() const { return {driver_, 0, nullptr}; }
  std::byte* allocate(std::size_t bytes) {
    auto* const memory = static_cast<std::byte*>(::operator new(bytes, HostApi::alignment));
    std::lock_guard const lock{api_->mutex};
    api_->memory[memory] = bytes;
    return memory;
  }
  void release(std::byte* memory) {
    std::lock_guard const lock{api_->mutex};
    api_->memory.erase(memory);
    ::operator delete(memory, HostApi::alignment);
  }
  std::byte* allocate_pinned(std::size_t bytes) { return static_cast<std::byte*>(::operator new(bytes, HostApi::alignment)); }
  void release_pinned(std::byte* memory) { ::operator delete(memory, HostApi::alignment); }
  void copy(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void zero(void* memory, std::size_t bytes) { std::memset(memory, 0, bytes); }
  std::string multiplies_not() const { return ""; }
  void step() { std::this_thread::sleep_for(std::chrono::milliseconds{2}); }

 private:
  std::shared_ptr<HostApi> api_ = std::make_shared<HostApi>();
  std::shared_ptr<dcp::detail::StreamDriver<HostApi>> driver_ = std::make_shared<dcp::detail::StreamDriver<HostApi>>(api_);
};
#else
void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error{std::string{"CUDA: "} + cudaGetErrorName(status) + ": " + cudaGetErrorString(status)};
}

/// Device 0, and a stream of the program's. cuBLAS is looked for when it runs, so that this builds where there is none.
class Gpu {
 public:
  Gpu() {
    must(cudaSetDevice(0));
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    void* library = nullptr;
    char const* const named = std::getenv("DCP_CUBLAS");
    for (std::string const& directory : {named != nullptr ? named + std::string{"/"} : "", std::string{}, std::string{"/usr/local/cuda/lib64/"}})
      for (std::string const version : {"13", "12"}) {
        if (library != nullptr) continue;
        static_cast<void>(::dlopen((directory + "libcublasLt.so." + version).c_str(), RTLD_NOW | RTLD_GLOBAL));   // which the other one needs, and may not find by itself
        library = ::dlopen((directory + "libcublas.so." + version).c_str(), RTLD_NOW | RTLD_LOCAL);
      }
    if (library == nullptr) return;
    auto const find = [&](char const* name, auto& call) { call = reinterpret_cast<std::remove_reference_t<decltype(call)>>(::dlsym(library, name)); };
    int (*create)(void**) = nullptr;
    int (*set_stream)(void*, cudaStream_t) = nullptr;
    find("cublasCreate_v2", create);
    find("cublasSetStream_v2", set_stream);
    find("cublasGemmEx", multiply_);
    if (create == nullptr || set_stream == nullptr || multiply_ == nullptr || create(&blas_) != 0 || set_stream(blas_, stream_) != 0) {
      multiply_ = nullptr;
      multiplies_not_ = "cuBLAS does not start";
    }
  }
  Gpu(Gpu const&) = delete;
  Gpu& operator=(Gpu const&) = delete;

  std::string name() const {
    cudaDeviceProp properties{};
    must(cudaGetDeviceProperties(&properties, 0));
    return properties.name;
  }
  std::uint64_t free_bytes() const {
    std::size_t free = 0, total = 0;
    must(cudaMemGetInfo(&free, &total));
    return free;
  }
  dcp::DeviceStream on() const { return dcp::on(stream_); }
  std::byte* allocate(std::size_t bytes) {
    void* memory = nullptr;
    must(cudaMalloc(&memory, bytes));
    return static_cast<std::byte*>(memory);
  }
  void release(std::byte* memory) { static_cast<void>(cudaFree(memory)); }
  std::byte* allocate_pinned(std::size_t bytes) {
    void* memory = nullptr;
    must(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable));
    return static_cast<std::byte*>(memory);
  }
  void release_pinned(std::byte* memory) { static_cast<void>(cudaFreeHost(memory)); }
  void copy(void* to, void const* from, std::size_t bytes) {
    must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
    must(cudaStreamSynchronize(stream_));
  }
  void zero(void* memory, std::size_t bytes) {
    must(cudaMemsetAsync(memory, 0, bytes, stream_));
    must(cudaStreamSynchronize(stream_));
  }
  std::string multiplies_not() const { return multiply_ == nullptr ? multiplies_not_ : ""; }
  /// A few products of matrices of bfloat16, in float32.
  void step() {
    constexpr int n = 8192, products = 4, bf16 = 14, in_float32 = 68, automatic = -1;   // CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
    constexpr std::size_t bytes = std::size_t{n} * n * 2;
    if (matrices_ == nullptr) {
      matrices_ = allocate(3 * bytes);
      zero(matrices_, 3 * bytes);
    }
    float const one = 1, nothing = 0;
    for (int i = 0; i < products; ++i)
      if (multiply_(blas_, 0, 0, n, n, n, &one, matrices_, bf16, n, matrices_ + bytes, bf16, n, &nothing, matrices_ + 2 * bytes, bf16, n, in_float32, automatic) != 0) throw std::runtime_error{"cuBLAS refused a product"};
    must(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  void* blas_ = nullptr;
  int (*multiply_)(void*, int, int, int, int, int, void const*, void const*, int, int, void const*, int, int, void const*, void*, int, int, int, int) = nullptr;
  std::string multiplies_not_ = "cuBLAS was not found";
  std::byte* matrices_ = nullptr;
};
#endif

std::int64_t number(Words const& words, std::string const& name, std::int64_t otherwise) {
  auto const at = words.find(name);
  return at == words.end() ? otherwise : std::stoll(at->second);
}
std::string text(Words const& words, std::string const& name) {
  auto const at = words.find(name);
  return at == words.end() ? "" : at->second;
}

/// Memory of the device that holds equal tensors, one behind the other.
class Tensors {
 public:
  Tensors(Gpu& gpu, dcp::DType dtype, std::int64_t count, dcp::Extents const& shape)
      : gpu_{gpu}, dtype_{dtype}, count_{static_cast<std::size_t>(count)}, shape_{shape}, each_{static_cast<std::size_t>(dcp::bytes_of(dtype, shape.elements()))}, memory_{gpu.allocate(count_ * each_)}, pattern_(each_) {
    std::uint32_t x = 1;
    for (std::size_t i = 0; i + 1 < each_; i += 2) {
      x = x * 1664525u + 1013904223u;
      dcp::bf16 const number{static_cast<float>(static_cast<std::int32_t>(x)) * 0x1p-31f};   // in either dtype a number that is finite
      std::uint16_t const bits = number.bits();
      std::memcpy(pattern_.data() + i, &bits, 2);
    }
  }
  Tensors(Tensors const&) = delete;
  Tensors& operator=(Tensors const&) = delete;
  ~Tensors() { gpu_.release(memory_); }

  std::byte* memory() const { return memory_; }
  std::size_t bytes() const { return count_ * each_; }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (std::size_t t = 0; t < count_; ++t) names.push_back("layers." + std::to_string(t) + ".weight");
    return names;
  }
  /// Views of `memory`, which lies as this.
  dcp::StateDict state(std::byte* memory) const {
    dcp::StateDict all;
    for (std::size_t t = 0; t < count_; ++t) all.add_tensor("layers." + std::to_string(t) + ".weight", dtype_, dcp::plain_layout(shape_), {memory + t * each_, dcp::row_major_strides(shape_)});
    return all;
  }
  dcp::StateDict state() const { return state(memory_); }
  void fill() {
    for (std::size_t t = 0; t < count_; ++t) gpu_.copy(memory_ + t * each_, contents(t).data(), each_);
  }
  void clear() { gpu_.zero(memory_, bytes()); }
  void check() {
    std::vector<std::byte> found(each_);
    for (std::size_t t = 0; t < count_; ++t) {
      gpu_.copy(found.data(), memory_ + t * each_, each_);
      if (found != contents(t)) throw std::runtime_error{"wrong contents"};
    }
  }
  void check_against(std::vector<std::byte> const& host) {
    std::vector<std::byte> found(bytes());
    gpu_.copy(found.data(), memory_, found.size());
    if (found != host) throw std::runtime_error{"not what a load to the host gives"};
  }

 private:
  // Each tensor begins at another place of the pattern.
  std::vector<std::byte> contents(std::size_t t) const {
    std::vector<std::byte> turned = pattern_;
    std::rotate(turned.begin(), turned.begin() + static_cast<std::ptrdiff_t>(t * 4096 % each_), turned.end());
    return turned;
  }
  Gpu& gpu_;
  dcp::DType dtype_;
  std::size_t count_;
  dcp::Extents shape_;
  std::size_t each_;
  std::byte* memory_;
  std::vector<std::byte> pattern_;
};

/// Saves in the background as a trainer makes them: one manager, one description of the state, a new step every time.
class Run {
 public:
  Run(dcp::SelfComm& self, std::string place, Tensors const& tensors, dcp::DeviceStream const& on, bool deferred) : root_{std::move(place)}, state_{tensors.state()} {
    auto const through = [&]<class Stager>(Stager) {
      dcp::ManagerOptions<dcp::SafeTensors> options;
      options.staging_bytes = tensors.bytes() + tensors.bytes() / 4 + (std::uint64_t{64} << 20);
      options.save.on = {on};
      auto const checkpoints = std::make_shared<dcp::CheckpointManager<dcp::SafeTensors, Stager>>(self, root_, options);
      save_ = [checkpoints](std::int64_t step, dcp::StateDict const& state) { return checkpoints->async_save(step, state); };
    };
    if (deferred) through(dcp::DeferredStager{});
    else through(dcp::CopyStager{});
  }
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

void must(bool ok, char const* what) {
  if (!ok) throw std::runtime_error{std::string{what} + ": " + std::strerror(errno)};
}

/// All files of tensors of a checkpoint, in pieces of 1 MiB.
void read_all(std::string const& place, int threads) {
  dcp::Workers<> workers{static_cast<std::size_t>(threads)};
  std::vector<dcp::AlignedBuffer> buffers;
  for (int t = 0; t < threads; ++t) buffers.emplace_back(std::size_t{1} << 20);
  for (auto const& entry : std::filesystem::directory_iterator{place}) {
    if (entry.path().extension() != ".safetensors") continue;
    auto const file = std::make_shared<dcp::FileHandle>(dcp::FileHandle::open_read(entry.path().string()));
    for (std::uint64_t begin = 0, size = file->size(); begin < size; begin += 4 << 20)
      workers.submit([&buffers, file, begin, size](std::size_t thread) {
        for (std::uint64_t at = begin, end = std::min<std::uint64_t>(size, begin + (4 << 20)); at < end; at += 1 << 20)
          file->read_at(at, {buffers[thread].data(), static_cast<std::size_t>(std::min<std::uint64_t>(1 << 20, end - at))});
      });
  }
  workers.finish([] {});
}

/// `bytes` bytes to one file, past the page cache where the file system has that, in writes of 4 MiB. Whether it has.
bool raw_writes(std::size_t bytes, std::string const& place, int threads) {
  constexpr std::size_t piece = 4 << 20;
  std::filesystem::create_directories(place);
  std::string const path = place + "/raw";
  bool direct = true;
  int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0666);
  if (file < 0 && errno == EINVAL) {
    direct = false;
    file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  }
  must(file >= 0, "open");
  must(::ftruncate(file, static_cast<off_t>(bytes)) == 0, "ftruncate");
  dcp::AlignedBuffer buffer{piece};
  std::memset(buffer.data(), 0x5A, piece);
  {
    dcp::Workers<> workers{static_cast<std::size_t>(threads)};
    for (std::size_t at = 0; at < bytes; at += piece)
      workers.submit([&, at](std::size_t) {
        std::size_t const size = dcp::round_up(std::min(piece, bytes - at), std::size_t{4096});
        must(::pwrite(file, buffer.data(), size, static_cast<off_t>(at)) == static_cast<ssize_t>(size), "pwrite");
      });
    workers.finish([] {});
  }
  must(::fsync(file) == 0, "fsync");
  ::close(file);
  int const directory = ::open(place.c_str(), O_RDONLY | O_DIRECTORY);
  must(directory >= 0 && ::fsync(directory) == 0, "fsync of the directory");
  ::close(directory);
  return direct;
}

/// Steps while `more(steps so far)`: the median of their seconds.
double median_step(Gpu& gpu, std::function<bool(int)> const& more) {
  std::vector<double> seconds;
  while (more(static_cast<int>(seconds.size()))) {
    auto const begin = Clock::now();
    gpu.step();
    seconds.push_back(since(begin));
  }
  if (seconds.empty()) throw std::runtime_error{"no step was made"};
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

class Server {
 public:
  explicit Server(Gpu& gpu) : gpu_{gpu} {}
  ~Server() { give_back(); }
  Server(Server const&) = delete;
  Server& operator=(Server const&) = delete;

  std::map<std::string, double> seconds;   // what the last command measured

  void command(std::string const& verb, Words const& words) {
    std::string const place = text(words, "place");
    auto const timed = [&](auto body) {
      auto const begin = Clock::now();
      body();
      seconds["seconds"] = since(begin);
    };
    if (verb == "state") {
      give_back();
      state_.emplace(gpu_, dcp::DType::f32, number(words, "tensors", 200), dcp::Extents{number(words, "rows", 640), number(words, "columns", 4096)});
    } else if (verb == "fill") {
      state_->fill();
    } else if (verb == "clear") {
      state_->clear();
    } else if (verb == "check") {
      state_->check();
    } else if (verb == "save") {
      std::filesystem::remove_all(place);
      timed([&] { save<dcp::SafeTensors>(place, *state_); });
    } else if (verb == "load") {
      timed([&] { load<dcp::SafeTensors>(place, state_->state()); });
    } else if (verb == "async") {
      Run& run = run_at(place, text(words, "stager") == "deferred");
      auto const begin = Clock::now();
      dcp::Pending pending = run.save();
      seconds["seconds"] = since(begin);
      if (text(words, "stager") == "deferred") {
        auto const event = pending.staged_event();
        while (!event.done()) std::this_thread::yield();
        seconds["staged"] = since(begin);
        auto const staged = Clock::now();
        pending.wait_staged();
        seconds["waited"] = since(staged);
      }
      pending.wait();
      seconds["commit"] = since(begin);
    } else if (verb == "pinned") {
      if (pinned_ == nullptr) pinned_ = gpu_.allocate_pinned(state_->bytes());
      if (text(words, "way") == "in") timed([&] { gpu_.copy(state_->memory(), pinned_, state_->bytes()); });
      else timed([&] { gpu_.copy(pinned_, state_->memory(), state_->bytes()); });
    } else if (verb == "read") {
      timed([&] { read_all(place, dcp::LoadOptions<dcp::SafeTensors>{}.threads); });
    } else if (verb == "raw") {
      bool direct = false;
      timed([&] { direct = raw_writes(state_->bytes(), place, dcp::SaveOptions<dcp::SafeTensors>{}.threads); });
      seconds["direct"] = direct ? 1 : 0;
    } else if (verb == "compute") {
      if (auto const reason = gpu_.multiplies_not(); !reason.empty()) throw std::runtime_error{reason};
      if (place.empty()) {
        seconds["seconds"] = median_step(gpu_, [&](int done) { return done < number(words, "steps", 200); });
      } else {
        dcp::Pending pending = run_at(place, true).save();
        std::atomic<bool> ended{false};
        std::jthread const waits{[&] {   // the only one that uses the communicator
          try {
            pending.wait();
          } catch (std::exception const& error) {
            failure_ = error.what();
          }
          ended = true;
        }};
        seconds["seconds"] = median_step(gpu_, [&](int done) { return done == 0 || !ended; });
      }
      if (!failure_.empty()) throw std::runtime_error{std::exchange(failure_, "")};
    } else if (verb == "matrices") {
      matrices_.emplace(gpu_, dcp::DType::bf16, number(words, "count", 8), dcp::Extents{4096, 4096});
    } else if (verb == "fill-matrices") {
      matrices_->fill();
    } else if (verb == "save-matrices") {
      std::filesystem::remove_all(place);
      timed([&] { is_fp8(words) ? save<Fp8>(place, *matrices_) : save<dcp::SafeTensors>(place, *matrices_); });
    } else if (verb == "load-matrices") {
      timed([&] { is_fp8(words) ? load<Fp8>(place, matrices_->state()) : load<dcp::SafeTensors>(place, matrices_->state()); });
    } else if (verb == "check-matrices") {
      std::vector<std::byte> host(matrices_->bytes());
      is_fp8(words) ? load<Fp8>(place, matrices_->state(host.data())) : load<dcp::SafeTensors>(place, matrices_->state(host.data()));
      matrices_->check_against(host);
    } else {
      throw std::runtime_error{"no such command"};
    }
  }

 private:
  static bool is_fp8(Words const& words) { return text(words, "as") == "fp8"; }
  template <class S>
  void save(std::string const& place, Tensors const& tensors) {
    dcp::SaveOptions<S> options;
    options.on = {gpu_.on()};
    dcp::save<S>(self_, place, tensors.state(), options);
  }
  template <class S>
  void load(std::string const& place, dcp::StateDict const& state) {
    dcp::LoadOptions<S> options;
    options.on = {gpu_.on()};
    dcp::load<S>(self_, place, state, options);
  }
  Run& run_at(std::string const& place, bool deferred) {
    auto at = runs_.find(place);
    if (at == runs_.end()) at = runs_.try_emplace(place, self_, place, *state_, gpu_.on(), deferred).first;
    at->second.remove_last();
    return at->second;
  }
  void give_back() {
    runs_.clear();
    if (pinned_ != nullptr) gpu_.release_pinned(std::exchange(pinned_, nullptr));
    state_.reset();
  }

  Gpu& gpu_;
  dcp::SelfComm self_;
  std::optional<Tensors> state_, matrices_;
  std::map<std::string, Run> runs_;   // by place
  std::byte* pinned_ = nullptr;
  std::string failure_;
};

int serve(Gpu& gpu, std::string const& folder) {
  Server server{gpu};
  std::ifstream commands{folder + "/ours.0"};
  std::ofstream answers{folder + "/ours.reply"};
  for (std::string line; std::getline(commands, line);) {
    std::istringstream in{line};
    std::string verb;
    in >> verb;
    Words words;
    for (std::string word; in >> word;) words[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    if (verb == "quit") return 0;
    server.seconds = {{"seconds", 0}};
    bool failed = false;
    try {
      server.command(verb, words);
    } catch (std::exception const& error) {
      std::cerr << line << ": " << error.what() << '\n';
      failed = true;
    }
    answers << '{';
    for (auto const& [name, value] : server.seconds) answers << '"' << name << "\": " << value << ", ";
    answers << "\"failed\": " << (failed ? "true" : "false") << "}\n" << std::flush;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: bench_gpu <folder with the pipes> | --info\n";
    return 2;
  }
  try {
    Gpu gpu;
    if (std::string{argv[1]} != "--info") return serve(gpu, argv[1]);
    std::cout << gpu.free_bytes() << '\n' << gpu.name() << '\n' << gpu.multiplies_not() << '\n';
  } catch (std::exception const& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
