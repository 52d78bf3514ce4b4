// SPDX-License-Identifier: Apache-2.0
#pragma once
// CUDA's devices, for tensors whose memory lies on them. Needs the CUDA runtime, 11 or later; component dcp::cuda.
//
// To have it   include this header in one file of the program; nothing else is to be done. A program with it also runs where there is no
//              GPU, and no driver: all memory is the host's there.
// To decode    what is quantized on the device, include device/cuda_decoders.cuh in one file that nvcc compiles; else the host decodes
// Borrowed     the streams and the memory of the program. Nothing is ever put into a stream of the program's but events, and waits for
//              events of the library's; the legacy stream and the per-thread stream are streams of the program's, never of the library's.
// Allocated    on the device: nothing. On the host: pinned memory, see streams.hpp. A context: on devices that tensors or streams belong
//              to, which have one already; asking where memory is makes none, and does not even initialise the driver.
// Thrown       Error(device), with the name that CUDA gives to what went wrong. An error that a kernel of the program's has left is met
//              by whatever comes after it, so it may be reported here.
// Fork         A child of a process that has used CUDA cannot use it, not even to ask where memory is: Error(device), if the parent has asked before.

#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/device/driver.hpp>
#include <dcp/device/streams.hpp>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <dlfcn.h>
#include <link.h>

namespace dcp {
namespace detail {

/// The calls of StreamApi, by the CUDA runtime. A status is a cudaError_t; those of the driver have the same numbers since CUDA 10.2.
class CudaApi {
 public:
  using Stream = cudaStream_t;
  using Event = cudaEvent_t;

  std::string_view name() const { return "CUDA"; }

  /// Asks the driver, as cudaPointerGetAttributes may make a context on the current device. The driver is looked for in the process, and neither loaded nor initialised: a
  /// process without it has no memory of its, and one that has initialised it could not fork into processes that use it.
  ///
  /// Memory of a device is `device` even where host and device share theirs. Integrated devices (cudaDevAttrIntegrated) and those that use the host's page tables
  /// (cudaDevAttrPageableMemoryAccessUsesHostPageTables) read the host's memory. The reverse does not follow: Jetson Thor has both attributes, and the host faults on what
  /// cudaMalloc gives there (NVIDIA Warp, design/hardware-coherent-memory-access.md). cudaDevAttrDirectManagedMemAccessFromHost speaks of managed memory only. A copy is right everywhere.
  template <class = Deferred>
  int where(void const* address, MemoryPlace& place) {
    place = {};
    auto const attributes_of = find_attributes_of();
    if (attributes_of == nullptr) return 0;
    // Wide enough and zero before: IS_MANAGED is "a boolean".
    unsigned type = 0, managed = 0;
    int ordinal = -1;
    std::array attributes{CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
    std::array<void*, 3> values{&type, &managed, &ordinal};
    CUresult const status = attributes_of(3, attributes.data(), values.data(), static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(address)));
    // Memory that CUDA does not know: zeroes, or, of older drivers, one of these.
    if (status == CUDA_ERROR_INVALID_VALUE || status == CUDA_ERROR_INVALID_CONTEXT) return 0;
    // Loaded and not used yet, so that nothing is CUDA's. If it was used, this is a child of the process that did.
    if (status == CUDA_ERROR_NOT_INITIALIZED && !used_) return 0;
    if (status != CUDA_SUCCESS) return static_cast<int>(status);
    if (!used_) used_ = true;
    if (type == 0) return 0;
    place.ordinal = ordinal;
    if (managed != 0) {
      // Where this is 0 (Tegra, WSL) the host must leave managed memory alone while any kernel runs (CUDA C++ Programming Guide, "Unified Memory on Windows, WSL, and Tegra"); copies may read it.
      int concurrent = 1;
      if (ordinal >= 0) {
        if (cudaError_t const failure = cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, ordinal); failure != cudaSuccess) return static_cast<int>(failure);
      }
      place.kind = concurrent != 0 ? MemoryKind::shared : MemoryKind::device;
    } else {
      place.kind = type == CU_MEMORYTYPE_HOST ? MemoryKind::pinned : MemoryKind::device;
    }
    return 0;
  }

  /// Puts the device's primary context, which the runtime uses, on top of the thread's, and takes it away again: the thread's current device, or that it has chosen none, stays
  /// as it is. To go back by cudaSetDevice would make a context on device 0 in threads that have never chosen one (since CUDA 12).
  template <class = Deferred>
  int enter(int ordinal) {
    Contexts const* const contexts = find_contexts();
    if (contexts == nullptr) return static_cast<int>(cudaErrorInsufficientDriver);
    CUcontext context = nullptr;
    {
      std::lock_guard const lock{mutex_};
      auto const at = static_cast<std::size_t>(std::max(0, ordinal));
      if (primary_.size() <= at) primary_.resize(at + 1);
      if (primary_[at] == nullptr) {
        CUdevice device = 0;
        CUresult status = contexts->device(&device, ordinal);
        if (status == CUDA_SUCCESS) status = contexts->retain(&primary_[at], device);   // never released: it is the program's, and stays as long
        if (status != CUDA_SUCCESS) return static_cast<int>(status);
      }
      context = primary_[at];
    }
    return static_cast<int>(contexts->push(context));
  }
  template <class = Deferred>
  int leave() {
    CUcontext context = nullptr;
    return static_cast<int>(find_contexts()->pop(&context));
  }

  int create_stream(cudaStream_t& stream) { return static_cast<int>(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  int destroy_stream(cudaStream_t stream) { return static_cast<int>(cudaStreamDestroy(stream)); }
  int create_event(cudaEvent_t& event) { return static_cast<int>(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)); }
  int destroy_event(cudaEvent_t event) { return static_cast<int>(cudaEventDestroy(event)); }
  int record(cudaEvent_t event, cudaStream_t stream) { return static_cast<int>(cudaEventRecord(event, stream)); }
  int wait(cudaStream_t stream, cudaEvent_t event) { return static_cast<int>(cudaStreamWaitEvent(stream, event, 0)); }
  int query(cudaEvent_t event) {
    cudaError_t const status = cudaEventQuery(event);
    // It is no error, and yet the runtime keeps it as the last one, which a program's check after a kernel would find.
    if (status == cudaErrorNotReady && cudaPeekAtLastError() == cudaErrorNotReady) static_cast<void>(cudaGetLastError());
    return static_cast<int>(status);
  }
  bool is_not_ready(int status) { return status == cudaErrorNotReady; }

  int copy(void* to, void const* from, std::size_t bytes, cudaStream_t stream) { return static_cast<int>(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream)); }
  template <class = Deferred>
  int copy_rows(void* to, std::size_t to_pitch, void const* from, std::size_t from_pitch, std::size_t bytes, std::size_t rows, cudaStream_t stream) {
    // What cudaMemcpy2DAsync refuses: rows that lie further apart than cudaDeviceProp::memPitch, which is this on all devices, and rows on top of each other.
    constexpr std::size_t most = 0x7fff'ffff;
    if (std::max(to_pitch, from_pitch) <= most && std::min(to_pitch, from_pitch) >= bytes)
      return static_cast<int>(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDefault, stream));
    for (std::size_t row = 0; row < rows; ++row) {
      int const status = copy(static_cast<std::byte*>(to) + row * to_pitch, static_cast<std::byte const*>(from) + row * from_pitch, bytes, stream);
      if (status != 0) return status;
    }
    return 0;
  }

  /// What device/cuda_decoders.cuh brings, if a file of the program includes that.
  using Decoder = int (*)(DeviceDecode const& work, cudaStream_t stream, bool& has_kernel);
  static void use(Decoder decoder) { decoder_ = decoder; }
  int decode(DeviceDecode const& work, cudaStream_t stream, bool& has_kernel) {
    Decoder const decoder = decoder_;
    return decoder == nullptr ? 0 : decoder(work, stream, has_kernel);
  }

  int allocate_pinned(void*& memory, std::size_t bytes) { return static_cast<int>(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable)); }
  int free_pinned(void* memory) { return static_cast<int>(cudaFreeHost(memory)); }

  void forget_error() { static_cast<void>(cudaGetLastError()); }
  template <class = Deferred>
  std::string words(int status) {
    auto const error = static_cast<cudaError_t>(status);
    return std::string{cudaGetErrorName(error)} + ": " + cudaGetErrorString(error);
  }
  cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

 private:
  using AttributesOf = CUresult (*)(unsigned, CUpointer_attribute*, void**, CUdeviceptr);

  /// Nothing while the process has no driver. To look for it takes 20 us, since the linker looks on the disk too, so that is done only when something has been loaded since.
  template <class = Deferred>
  AttributesOf find_attributes_of() {
    if (AttributesOf const known = attributes_of_) return known;
    std::uint64_t loads = 0;
    static_cast<void>(::dl_iterate_phdr([](dl_phdr_info* info, std::size_t, void* into) { return *static_cast<std::uint64_t*>(into) = info->dlpi_adds, 1; }, &loads));
    if (loads == loads_) return nullptr;
    AttributesOf found = nullptr;
    if (void* const driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD)) found = reinterpret_cast<AttributesOf>(::dlsym(driver, "cuPointerGetAttributes"));
    if (found == nullptr) loads_ = loads;
    else attributes_of_ = found;
    return found;
  }

  struct Contexts {
    CUresult (*device)(CUdevice*, int);
    CUresult (*retain)(CUcontext*, CUdevice);
    CUresult (*push)(CUcontext);
    CUresult (*pop)(CUcontext*);
  };
  /// The driver is in the process by the time that somebody has memory or a stream of a device.
  template <class = Deferred>
  Contexts const* find_contexts() {
    std::lock_guard const lock{mutex_};
    if (contexts_.pop != nullptr) return &contexts_;
    void* const driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (driver == nullptr) return nullptr;
    auto const find = [&](char const* name, auto& function) { function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(driver, name)); };
    Contexts found{};
    find("cuDeviceGet", found.device);
    find("cuDevicePrimaryCtxRetain", found.retain);
    find("cuCtxPushCurrent_v2", found.push);
    find("cuCtxPopCurrent_v2", found.pop);
    if (found.device == nullptr || found.retain == nullptr || found.push == nullptr || found.pop == nullptr) return nullptr;
    contexts_ = found;
    return &contexts_;
  }

  inline static Atomic<Decoder> decoder_{nullptr};
  Mutex mutex_;
  Contexts contexts_{};
  std::vector<CUcontext> primary_;   // of each device, as far as it was needed
  Atomic<AttributesOf> attributes_of_{nullptr};
  Atomic<std::uint64_t> loads_{0};   // when there was no driver
  Atomic<bool> used_{false};
};

/// The only one. It stays until the process ends, as CUDA may be gone before the destructors of static objects.
template <class = Deferred>
std::shared_ptr<StreamDriver<CudaApi>> const& cuda_driver() {
  static auto* const one = new std::shared_ptr<StreamDriver<CudaApi>>{std::make_shared<StreamDriver<CudaApi>>(std::make_shared<CudaApi>())};
  return *one;
}

/// Before main, and once, however many files include this. Calls nothing of CUDA.
inline bool const cuda_is_added = (DeviceDrivers<>::instance().add(cuda_driver()), true);

/// What stream 0 is in the file that is being compiled.
#ifdef CUDA_API_PER_THREAD_DEFAULT_STREAM
inline constexpr bool default_stream_is_per_thread_here = true;
#else
inline constexpr bool default_stream_is_per_thread_here = false;
#endif

}  // namespace detail

/// "In the order of this stream": what reads tensors comes after what is in the stream at the moment, and what is put into the stream later comes after what writes them. The
/// stream is borrowed until the operation that gets it has ended, and must not be capturing a graph. Costs one question to the runtime, of less than a microsecond.
///
/// It may be any stream of any device: an ordinary one, cudaStreamLegacy (nullptr is that, or cudaStreamPerThread in files compiled so), which is the current device's, and
/// cudaStreamPerThread, which is the current device's and of the thread that calls the library. The device of an ordinary one is asked for where CUDA can tell (12.8 or later);
/// before, it is the current device. Throws Error(device) where there is no driver or no device.
///
/// Example   train_step<<<blocks, threads, 0, stream>>>(weights);  auto const order = dcp::on(stream);
template <bool PerThread = detail::default_stream_is_per_thread_here>
DeviceStream on(cudaStream_t stream) {
  if (stream == nullptr) stream = PerThread ? cudaStreamPerThread : cudaStreamLegacy;
  auto const& driver = detail::cuda_driver();
  int ordinal = -1;
  cudaError_t status = cudaErrorCallRequiresNewerDriver;
#if CUDART_VERSION >= 12080
  if (stream != cudaStreamLegacy && stream != cudaStreamPerThread) status = cudaStreamGetDevice(stream, &ordinal);
#endif
  if (status == cudaErrorCallRequiresNewerDriver) status = cudaGetDevice(&ordinal);
  if (status != cudaSuccess) {
    driver->api().forget_error();
    throw Error{ErrorCode::device, "CUDA refused to say which device a stream belongs to: " + driver->api().words(static_cast<int>(status))}
        .with_hint("nvidia-smi lists the devices, if there is a driver; CUDA_VISIBLE_DEVICES says which of them this process has");
  }
  return {driver, ordinal, stream};
}

}  // namespace dcp
