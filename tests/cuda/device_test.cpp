// SPDX-License-Identifier: Apache-2.0
// The CUDA driver on a device: run where there is one, and compiled everywhere.
#include <dcp/device/cuda.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>

namespace {

void check_cuda(cudaError_t status) {
  INFO(cudaGetErrorName(status));
  REQUIRE(status == cudaSuccess);
}
void check_driver(CUresult status) { REQUIRE(status == CUDA_SUCCESS); }

dcp::DeviceDriver& driver() { return *dcp::detail::cuda_driver(); }

void check_place(void const* address, dcp::MemoryKind kind, int ordinal) {
  auto const place = driver().where(address);
  CHECK(place.kind == kind);
  if (ordinal >= 0) CHECK(place.ordinal == ordinal);
}

int devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count));
  REQUIRE(count > 0);   // CMake registers this test where a device was found
  return count;
}
int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, ordinal));
  return value;
}

/// A call of the driver's, to which nothing is linked.
template <class F>
F* driver_call(char const* name) {
  void* const driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  REQUIRE(driver != nullptr);
  void* const call = ::dlsym(driver, name);
  REQUIRE(call != nullptr);
  return reinterpret_cast<F*>(call);
}

/// Puts a pause into the stream.
void pause(cudaStream_t stream) {
  check_cuda(cudaLaunchHostFunc(stream, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds{300}); }, nullptr));
}

class Stream {
 public:
  Stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(Stream const&) = delete;
  Stream& operator=(Stream const&) = delete;
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_{};
};

class DeviceBytes {
 public:
  explicit DeviceBytes(std::size_t bytes) { check_cuda(cudaMalloc(&memory_, bytes)); }
  DeviceBytes(DeviceBytes const&) = delete;
  DeviceBytes& operator=(DeviceBytes const&) = delete;
  ~DeviceBytes() { static_cast<void>(cudaFree(memory_)); }
  std::byte* get() const { return static_cast<std::byte*>(memory_); }

 private:
  void* memory_ = nullptr;
};

/// Which devices have a context: the one thing that asking where memory is must not change.
std::vector<int> contexts() {
  std::vector<int> active;
  for (int ordinal = 0; ordinal < devices(); ++ordinal) {
    unsigned flags = 0;
    int state = 0;
    check_driver(driver_call<decltype(cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState")(ordinal, &flags, &state));
    active.push_back(state);
  }
  return active;
}

}  // namespace

TEST_CASE("CUDA: to ask where memory is makes no context on any device") {
  int const count = devices();   // loads and initialises the driver
  std::vector<int> const before = contexts();
  CHECK(before == std::vector<int>(static_cast<std::size_t>(count), 0));   // the first case of this program
  std::vector<int> heap(1000);
  check_place(heap.data(), dcp::MemoryKind::host, -1);
  check_place(&count, dcp::MemoryKind::host, -1);
  CHECK(contexts() == before);
}

TEST_CASE("CUDA: every kind of memory is recognised, with its device, from any device and thread, and inside an allocation") {
  int const count = devices();
  constexpr std::size_t bytes = std::size_t{4} << 20;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    check_cuda(cudaSetDevice(ordinal));
    auto const check = [&](void* memory, dcp::MemoryKind kind, int on) {
      auto* const first = static_cast<std::byte*>(memory);
      for (int current : {ordinal, 0, count - 1}) {
        check_cuda(cudaSetDevice(current));
        check_place(first, kind, on);
        check_place(first + 12'345, kind, on);
        check_place(first + bytes - 1, kind, on);
      }
      dcp::MemoryPlace there;
      std::thread{[&] { there = driver().where(first); }}.join();
      CHECK(there.kind == kind);
      check_cuda(cudaSetDevice(ordinal));
    };
    void* memory = nullptr;

    check_cuda(cudaMalloc(&memory, bytes));
    check(memory, dcp::MemoryKind::device, ordinal);
    check_cuda(cudaFree(memory));

    if (attribute(cudaDevAttrManagedMemory, ordinal) != 0) {
      check_cuda(cudaMallocManaged(&memory, bytes));
      check(memory, attribute(cudaDevAttrConcurrentManagedAccess, ordinal) != 0 ? dcp::MemoryKind::shared : dcp::MemoryKind::device, -1);
      check_cuda(cudaFree(memory));
    }

    check_cuda(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable));
    check(memory, dcp::MemoryKind::pinned, -1);
    check_cuda(cudaFreeHost(memory));

    std::vector<std::byte> registered(bytes);
    check_cuda(cudaHostRegister(registered.data(), bytes, cudaHostRegisterDefault));
    check(registered.data(), dcp::MemoryKind::pinned, -1);
    check_cuda(cudaHostUnregister(registered.data()));
    check(registered.data(), dcp::MemoryKind::host, -1);

    if (attribute(cudaDevAttrMemoryPoolsSupported, ordinal) != 0) {
      Stream const stream;
      check_cuda(cudaMallocAsync(&memory, bytes, stream));
      check(memory, dcp::MemoryKind::device, ordinal);
      check_cuda(cudaFreeAsync(memory, stream));
      check_cuda(cudaStreamSynchronize(stream));
    }
  }
  check_cuda(cudaSetDevice(0));
}

TEST_CASE("CUDA: memory that was mapped by hand is its device's") {
  for (int ordinal = 0; ordinal < devices(); ++ordinal) {
    int supported = 0;
    check_driver(driver_call<decltype(cuDeviceGetAttribute)>("cuDeviceGetAttribute")(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, ordinal));
    if (supported == 0) {
      MESSAGE("device " << ordinal << " has no virtual memory management");
      continue;
    }
    check_cuda(cudaSetDevice(ordinal));
    check_cuda(cudaFree(nullptr));   // a context
    CUmemAllocationProp what{};
    what.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    what.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    what.location.id = ordinal;
    std::size_t bytes = 0;
    check_driver(driver_call<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(&bytes, &what, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    CUmemGenericAllocationHandle handle{};
    check_driver(driver_call<decltype(cuMemCreate)>("cuMemCreate")(&handle, bytes, &what, 0));
    CUdeviceptr address = 0;
    check_driver(driver_call<decltype(cuMemAddressReserve)>("cuMemAddressReserve")(&address, bytes, 0, 0, 0));
    check_driver(driver_call<decltype(cuMemMap)>("cuMemMap")(address, bytes, 0, handle, 0));
    CUmemAccessDesc access{};
    access.location = what.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    check_driver(driver_call<decltype(cuMemSetAccess)>("cuMemSetAccess")(address, bytes, &access, 1));
    auto const* const memory = reinterpret_cast<std::byte const*>(static_cast<std::uintptr_t>(address));
    check_place(memory, dcp::MemoryKind::device, ordinal);
    check_place(memory + bytes - 1, dcp::MemoryKind::device, ordinal);
    check_driver(driver_call<decltype(cuMemUnmap)>("cuMemUnmap")(address, bytes));
    check_driver(driver_call<decltype(cuMemRelease)>("cuMemRelease")(handle));
    check_driver(driver_call<decltype(cuMemAddressFree)>("cuMemAddressFree")(address, bytes));
  }
  check_cuda(cudaSetDevice(0));
}

TEST_CASE("CUDA: dcp::on() knows the device of a stream") {
  int const last = devices() - 1;
  check_cuda(cudaSetDevice(last));
  Stream const stream;
  CHECK(dcp::on(stream).ordinal == last);
  CHECK(dcp::on(stream).stream == static_cast<void*>(static_cast<cudaStream_t>(stream)));
  CHECK(dcp::on(nullptr).ordinal == last);
  check_cuda(cudaSetDevice(0));
#if CUDART_VERSION >= 12080
  CHECK(dcp::on(stream).ordinal == last);   // whatever is current
#endif
  CHECK(dcp::on(nullptr).ordinal == 0);
}

TEST_CASE("CUDA: a lane copies what a stream has written by then, and a stream reads what a lane has written, whichever stream it is") {
  int const last = devices() - 1;
  check_cuda(cudaSetDevice(last));
  constexpr std::size_t bytes = std::size_t{8} << 20;
  DeviceBytes const a{bytes}, b{bytes};
  Stream const own;
  for (cudaStream_t const stream : {static_cast<cudaStream_t>(own), static_cast<cudaStream_t>(nullptr), cudaStreamLegacy, cudaStreamPerThread}) {
    auto const named = dcp::on(stream);
    REQUIRE(named.ordinal == last);
    check_cuda(cudaMemset(a.get(), 1, bytes));
    check_cuda(cudaDeviceSynchronize());

    // Device to host, after work that is late.
    pause(stream);
    check_cuda(cudaMemsetAsync(a.get(), 2, bytes, stream));
    auto const written = named.driver->record(named.ordinal, named.stream);
    CHECK(!written->done());
    CHECK(cudaPeekAtLastError() == cudaSuccess);   // "not ready" is not left to the program
    check_cuda(cudaSetDevice(0));
    auto const lane = named.driver->lane(last);
    lane->after(*written);
    auto const pinned = lane->buffer(0, bytes);
    check_place(pinned.data(), dcp::MemoryKind::pinned, -1);
    lane->copy(pinned.data(), bytes, a.get(), bytes, bytes, 1);
    lane->finish();
    CHECK(written->done());
    CHECK(std::ranges::all_of(pinned, [](std::byte one) { return one == std::byte{2}; }));

    // Host to device, rows that are apart on one side; and the stream's own work after that.
    int current = -1;
    check_cuda(cudaGetDevice(&current));
    CHECK(current == 0);   // the caller's device is the caller's
    constexpr std::size_t rows = 1024, row = 1000, pitch = 4096;
    std::ranges::fill(pinned, std::byte{3});
    lane->copy(b.get(), pitch, pinned.data(), row, row, rows);
    lane->finish();
    check_cuda(cudaSetDevice(last));
    std::vector<std::byte> found(pitch * rows, std::byte{9});
    check_cuda(cudaMemcpyAsync(found.data(), b.get(), found.size(), cudaMemcpyDefault, stream));
    check_cuda(cudaStreamSynchronize(stream));
    for (std::size_t i = 0; i < rows; ++i) REQUIRE(std::all_of(found.begin() + static_cast<std::ptrdiff_t>(i * pitch), found.begin() + static_cast<std::ptrdiff_t>(i * pitch + row), [](std::byte one) { return one == std::byte{3}; }));
  }
  check_cuda(cudaSetDevice(0));
}

TEST_CASE("CUDA: a stream waits for an event of another one's") {
  check_cuda(cudaSetDevice(0));
  constexpr std::size_t bytes = std::size_t{1} << 20;
  DeviceBytes const a{bytes};
  Stream const first, second;
  check_cuda(cudaMemset(a.get(), 1, bytes));
  check_cuda(cudaDeviceSynchronize());
  pause(first);
  check_cuda(cudaMemsetAsync(a.get(), 2, bytes, first));
  auto const named = dcp::on(second);
  named.driver->order(named.ordinal, named.stream, *named.driver->record(0, static_cast<cudaStream_t>(first)));
  std::vector<std::byte> found(bytes);
  check_cuda(cudaMemcpyAsync(found.data(), a.get(), bytes, cudaMemcpyDefault, second));
  check_cuda(cudaStreamSynchronize(second));
  CHECK(std::ranges::all_of(found, [](std::byte one) { return one == std::byte{2}; }));
}

TEST_CASE("CUDA: rows further apart than a copy of rows may be, and rows on top of each other, are copied one by one") {
  check_cuda(cudaSetDevice(0));
  constexpr std::size_t apart = (std::size_t{1} << 31) + 4096, row = 4096;
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total));
  REQUIRE(free > apart + (std::size_t{64} << 20));
  DeviceBytes const far_apart{apart + row};
  check_cuda(cudaMemset(far_apart.get(), 1, row));
  check_cuda(cudaMemset(far_apart.get() + apart, 2, row));
  check_cuda(cudaDeviceSynchronize());
  auto const lane = driver().lane(0);
  std::vector<std::byte> found(2 * row);
  lane->copy(found.data(), row, far_apart.get(), apart, row, 2);
  lane->finish();
  CHECK(found.front() == std::byte{1});
  CHECK(found.back() == std::byte{2});
  lane->copy(found.data(), row, far_apart.get() + apart, 0, row, 2);
  lane->finish();
  CHECK(found.front() == std::byte{2});
  CHECK(cudaPeekAtLastError() == cudaSuccess);
}

TEST_CASE("CUDA: a mistake is an Error with CUDA's name for it, and is not left to the program") {
  check_cuda(cudaSetDevice(0));
  std::string said;
  try {
    static_cast<void>(driver().lane(devices()));
  } catch (dcp::Error const& error) {
    CHECK(error.code() == dcp::ErrorCode::device);
    said = error.message();
  }
  CHECK(said.find("cudaErrorInvalidDevice") != std::string::npos);
  CHECK(cudaPeekAtLastError() == cudaSuccess);
}
